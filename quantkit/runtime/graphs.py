"""`graphed(model)`: a model on a GPU whose decode step is captured in a CUDA graph, or the reason why it runs eager.

In Python, one step of a 32-layer model launches about a thousand kernels, and launching takes longer than running them.
Here transformers runs the prompt, then one step is captured (`buffers`), and each replay is a single launch. Picking a
token stays outside the graph.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from quantkit_eval.model import device_of, inference
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from quantkit.errors import ModelError
from quantkit.layers import kv_attention, kv_buffer
from quantkit.layers.kv_cache import attached
from quantkit.runtime.buffers import Buffers, CaptureFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.scheme import KVScheme

ROUND = 64  # buffers are a multiple of this many tokens long


class Sequence:
    """One sequence: its tokens and its buffers, which the model reuses once the sequence is dropped."""

    def __init__(self, buffers: Buffers, tokens: list[int]) -> None:
        self.buffers, self.tokens = buffers, tokens

    def __len__(self) -> int:
        return len(self.tokens)


class GraphDecoder:
    """A causal LM whose prompt runs eager and whose steps replay a graph, for a prompt and `room` new tokens.

    It is called like the model; `past_key_values` is then the `Sequence`, and its logits are valid until the next call.
    If the first step cannot be captured, a warning says why, and this and all later steps run eager in transformers.
    """

    def __init__(self, model: PreTrainedModel, room: int) -> None:
        self.model, self.room = model, room
        self.device = device_of(model)
        self.config, self.generation_config = model.config, getattr(model, "generation_config", None)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def why_eager(self) -> str | None:
        """The reason if a capture of this model failed."""
        return _shelf(self.model).failed

    def modules(self) -> Iterator[nn.Module]:
        """None: the mode is switched for the prompt and the capture, not at every token."""
        return iter(())

    def eval(self) -> GraphDecoder:
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> Any:
        """input_ids [1, M] -> `.logits` [1, logits_to_keep or M, vocabulary] and `.past_key_values`."""
        if input_ids.shape[0] != 1:
            raise ValueError(f"a captured step runs one sequence, got {input_ids.shape[0]}")
        options = {"logits_to_keep": logits_to_keep} if self._keeps else {}
        if past_key_values is None and not self.why_eager:
            return self._prompt(input_ids, options)
        if not isinstance(past_key_values, Sequence):
            return self._eager(input_ids, past_key_values, use_cache, options)
        return self._steps(input_ids, past_key_values)

    __call__ = forward

    def _eager(self, input_ids: torch.Tensor, cache: Any, use_cache: bool, options: dict[str, Any]) -> Any:
        with inference(self.model):
            return self.model(
                input_ids=input_ids.to(self.device), past_key_values=cache, use_cache=use_cache, **options
            )

    def _prompt(self, input_ids: torch.Tensor, options: dict[str, Any]) -> SimpleNamespace:
        shelf, tokens = _shelf(self.model), input_ids[0].tolist()
        buffers = shelf.take(self.model, len(tokens) + self.room, self.device)
        logits = buffers.prompt(self.model, input_ids, **options)
        sequence = Sequence(buffers, tokens)
        weakref.finalize(sequence, shelf.give_back, buffers).atexit = False
        return SimpleNamespace(logits=logits, past_key_values=sequence)

    def _steps(self, input_ids: torch.Tensor, sequence: Sequence) -> Any:
        buffers, logits = sequence.buffers, []
        for token in input_ids[0].tolist():
            if len(sequence) == buffers.length:
                raise ModelError(f"there is room for {buffers.length} tokens; start with more")
            try:
                found = buffers.step(self.model, token, len(sequence))
            except CaptureFailed as error:
                _shelf(self.model).failed = str(error)
                warnings.warn(f"decodes without CUDA graphs: {error}", stacklevel=3)
                every = torch.tensor([sequence.tokens + input_ids[0].tolist()])
                return self._eager(every, None, True, {})
            sequence.tokens.append(token)
            logits.append(found if input_ids.shape[1] == 1 else found.clone())
        return SimpleNamespace(
            logits=torch.cat(logits, 1) if len(logits) > 1 else logits[0], past_key_values=sequence
        )


class _Shelf:
    """What a model keeps between sequences: at most one set of buffers with its graph, and why a capture failed."""

    def __init__(self) -> None:
        self.failed: str | None = None
        self._lock = threading.Lock()
        self._buffers: Buffers | None = None

    def take(self, model: PreTrainedModel, tokens: int, device: torch.device) -> Buffers:
        """Buffers for `tokens` tokens: the kept ones if they fit, not twice too long and made for these weights."""
        length = -(-tokens // ROUND) * ROUND
        stamp = _stamp(model)
        with self._lock:
            kept, self._buffers = self._buffers, None
        if kept is not None and length <= kept.length <= 2 * length and kept.stamp == stamp:
            return kept
        del kept  # its memory first
        return Buffers(len(_cache_layers(model)), length, device, stamp, attached(model))

    def give_back(self, buffers: Buffers) -> None:
        if buffers.replay is not None:
            with self._lock:
                self._buffers = buffers


_shelves: weakref.WeakKeyDictionary[nn.Module, _Shelf] = weakref.WeakKeyDictionary()


def _shelf(model: PreTrainedModel) -> _Shelf:
    return _shelves.setdefault(model, _Shelf())


def _stamp(model: PreTrainedModel) -> Any:
    """Changes when a captured step would read memory that is no longer the model's, or should run other code."""
    addresses = tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))
    return model.config._attn_implementation, attached(model), addresses


def _cache_layers(model: PreTrainedModel) -> list[Any]:
    return DynamicCache(config=model.config).layers


def graphed(model: PreTrainedModel, room: int) -> GraphDecoder | str:
    """The decoder of a causal LM for `room` new tokens, or why it decodes eager."""
    places = {t.device for t in (*model.parameters(), *model.buffers())}
    if any(place.type != "cuda" for place in places):
        where = "parts of it are offloaded" if len(places) > 1 else f"it is on {device_of(model)}"
        return f"CUDA graphs need the whole model on a CUDA device; {where}"
    if len(places) > 1:
        return f"the model is spread over {len(places)} devices"
    return unfit(model) or _shelf(model).failed or GraphDecoder(model, room)


def unfit(model: PreTrainedModel) -> str | None:
    """Why a model has no step of fixed shapes, wherever it is; None if it should have one."""
    name, attention = type(model).__name__, model.config._attn_implementation
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers does not support a static cache for {name}"
    quantized = attached(model)
    if quantized is not None and (reason := _unfit_cache(model, quantized.scheme)):
        return reason
    if quantized is None and attention not in ("sdpa", "eager"):
        return f"{attention} attention is not masked; load the model with sdpa"
    layers = _cache_layers(model)
    foreign = {type(layer).__name__ for layer in layers} - {
        DynamicLayer.__name__,
        DynamicSlidingWindowLayer.__name__,
    }
    if foreign or not layers:
        return f"{name} has a cache of another kind: {', '.join(sorted(foreign)) or 'no layers'}"
    every = [getattr(part, "rope_type", None) for part in model.modules()]  # gemma 3: one per kind of layer
    kinds = {kind for each in every for kind in (each.values() if isinstance(each, dict) else [each])}
    if moving := kinds & {"dynamic", "longrope"}:
        return f"its {moving.pop()} rotary embedding changes with the length"
    return None


def _unfit_cache(model: PreTrainedModel, scheme: KVScheme) -> str | None:
    """Why a model's quantized cache cannot be read in a captured step, or None."""
    config = model.config.get_text_config(decoder=True)
    attention = config._attn_implementation
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if attention != kv_attention.NAME:
        return f"{attention} attention does not read a quantized KV cache where it lies"
    if d > kv_buffer.MOST_CHANNELS:
        return f"its heads of {d} channels are more than {kv_buffer.MOST_CHANNELS} in a quantized KV cache"
    return kv_buffer.refuses(scheme)
