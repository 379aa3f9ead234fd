"""`native(model)`: the model as one native call per step, or the reason why it runs eager."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from quantkit_kernels import INPUTS
from quantkit_kernels.cpu import library
from quantkit_kernels.cpu.decoder import CACHES, MOST_SINKS, Cache, Decoder, Tables
from quantkit_kernels.cpu.together import step_together, timed
from torch import nn

from quantkit.errors import BackendError
from quantkit.layers.kv_cache import attached
from quantkit.layers.quant_linear import QuantLinear
from quantkit.runtime.rotary import Rotary
from quantkit.runtime.tables import ROUNDED, NotNative, tables

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 128  # tokens of a prompt per call


class Sequence:
    """One sequence of a native model: its key-value cache and its length."""

    def __init__(self, decoder: Decoder, rotary: Rotary) -> None:
        self._decoder, self._rotary = decoder, rotary

    def append(self, tokens: torch.Tensor, keep: int = 1, chunk: int = CHUNK) -> torch.Tensor:
        """Run tokens [M], `chunk` at a time; fp32 logits [keep, vocabulary] of the last `keep`."""
        start, length = len(self), len(tokens)
        if not length:
            raise ValueError("there are no tokens to append")
        logits = []
        for first in range(0, length, chunk):
            part = tokens[first : first + chunk]
            last = first + len(part)
            cos, sin = self._rotary.rows(start + first, start + last, start + length)
            kept = min(max(last - (length - keep), 0), len(part))
            logits.append(self._decoder.step(part, cos, sin, kept))
        return logits[-1] if keep <= len(logits[-1]) else torch.cat(logits)

    @staticmethod
    def step(sequences: Collection[Sequence], tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens int64 [B], one to each of B sequences of one model; fp32 logits [B, vocabulary].

        The weights are read once. Every sequence gets what it would get alone (see `step_together`).
        """
        angles = [each._rotary.rows(len(each), len(each) + 1, len(each) + 1) for each in sequences]
        cos, sin = (torch.cat(part) for part in zip(*angles, strict=True))
        return step_together([each._decoder for each in sequences], tokens, cos, sin)

    def timed(self) -> AbstractContextManager[dict[str, float]]:
        """Seconds by part of a step, of the steps that this sequence takes or is the first of."""
        return timed(self._decoder)

    def __len__(self) -> int:
        return self._decoder.length

    @property
    def cache_bytes(self) -> int:
        return self._decoder.cache_bytes

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length`."""
        self._decoder.truncate(length)
        self._rotary.truncate(length)


class NativeDecoder:
    """A causal LM as the native decoder runs it. `start` begins a sequence; sequences may run in parallel threads.

    It is called like the model it was made from, for one sequence without padding; `past_key_values` is then the
    `Sequence`. It keeps the weights alive, not the model.
    """

    device = torch.device("cpu")

    def __init__(self, model: PreTrainedModel, compute: str, cache: Cache) -> None:
        self.tables: Tables = tables(model, compute)
        halves = compute == "float" and model.dtype in (torch.bfloat16, torch.float16)
        self.compute, self.cache = "halves" if halves else compute, cache
        self.config, self.generation_config = model.config, getattr(model, "generation_config", None)
        self._rotary = model.model.rotary_emb
        self.start()  # a model the decoder does not take says so here

    def start(self) -> Sequence:
        return Sequence(Decoder(self.tables, self.compute, self.cache), Rotary(self._rotary))

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: Sequence | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        """input_ids [1, M] -> `.logits` [1, logits_to_keep or M, vocabulary] and `.past_key_values`."""
        if input_ids.shape[0] != 1:
            raise ValueError(f"the native path runs one sequence at a time, got {input_ids.shape[0]}")
        sequence = self.start() if past_key_values is None else past_key_values
        logits = sequence.append(input_ids[0], logits_to_keep or input_ids.shape[1])
        return SimpleNamespace(logits=logits[None], past_key_values=sequence if use_cache else None)

    __call__ = forward

    def modules(self) -> Iterator[nn.Module]:
        """None: there is no mode to switch."""
        return iter(())

    def eval(self) -> NativeDecoder:
        return self


_made: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, NativeDecoder]]] = (
    weakref.WeakKeyDictionary()
)
_making = threading.Lock()


def native(
    model: PreTrainedModel, compute: str | None = None, cache_dtype: torch.dtype = torch.float32
) -> NativeDecoder | str:
    """The native decoder of a causal LM, or why there is none. Built once per model, and again if weights change.

    compute: how packed linears are multiplied, "float", "int8" (activations in int8, one scale per token and group)
    or "int8-token"; None: as the model was loaded. Under "float", linears whose inputs the checkpoint rounds keep that.
    cache_dtype: of keys and values, fp32 or bf16, unless the model has a quantized cache (`quantkit.layers.kv_cache`).
    """
    known = [name for name in INPUTS if name not in ROUNDED]
    if compute is not None and compute not in known:
        raise ValueError(f"unknown compute {compute!r}; known: {', '.join(known)}")
    if library.load() is None:
        return "the native CPU library is not built"
    try:
        library.isa()
    except RuntimeError as error:  # QUANTKIT_ISA names a path that this machine lacks
        raise BackendError(str(error)) from error
    with _making:
        made, stamp = _made.setdefault(model, {}), _stamp(model)
        try:
            key = _compute(model) if compute is None else compute, _cache(model, cache_dtype)
            if key not in made or made[key][0] != stamp:
                made[key] = stamp, NativeDecoder(model, *key)
        except NotNative as reason:
            return str(reason)
        return made[key][1]


def _cache(model: PreTrainedModel, dtype: torch.dtype) -> Cache:
    """What the cache of a model holds. NotNative for a scheme that the decoder does not have."""
    told = attached(model)
    if told is None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"a cache is fp32 or bf16, not {dtype}")
        return Cache("bf16" if dtype == torch.bfloat16 else "fp32")
    scheme, kind = told.scheme, told.scheme.keys.number.name
    plain = scheme.keys == scheme.values and scheme.keys.symmetric and scheme.keys.group_size is None
    plain = plain and (scheme.keys.granularity == "token") == scheme.dynamic
    if not plain or scheme.residual or kind not in CACHES or (kind == "fp8_e4m3") == scheme.dynamic:
        raise NotNative(f"the native path has no cache {scheme}")
    if scheme.sinks > MOST_SINKS or (scheme.sinks and not scheme.dynamic):
        raise NotNative(
            f"the native path keeps up to {MOST_SINKS} first tokens exact, in INT8 and INT4, not {scheme}"
        )
    return Cache(kind, scheme.rotate, scheme.sinks)


def _compute(model: PreTrainedModel) -> str:
    """What the packed linears were loaded with, but for those whose inputs the checkpoint rounds."""
    asked = {module.compute for module in model.modules() if isinstance(module, QuantLinear)}
    asked = asked - {*ROUNDED} or {"float"}
    if len(asked) > 1:
        raise NotNative(f"its linears were loaded with compute {' and '.join(sorted(asked))}")
    return asked.pop()


def _stamp(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """Changes when a weight is replaced or written to."""
    tensors = (*model.parameters(), *model.buffers())
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if not t.is_meta)
