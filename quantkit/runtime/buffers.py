"""Preallocated memory for one sequence, and the decode step captured on it.

The keys and values go to buffers as long as the sequence can get. A step reads its token and its position from memory,
so that it can be captured once and replayed. Attention covers the whole buffer under a mask. Sliding windows are masks
too: a window that moved in a fixed buffer would need another graph when it is full. A quantized cache is held as codes
(`quantkit/layers/kv_buffer.py`), of which a step reads only the places that its mask shows.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from quantkit_eval.model import inference
from transformers.cache_utils import Cache, CacheLayerMixin

from quantkit.layers.kv_buffer import KVBuffer, Seen
from quantkit.layers.kv_cache import Attached, QuantizedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.numerics.kv import KVScales
    from quantkit.scheme import KVScheme

WARM_UP = 3  # steps before the capture, in which kernels are compiled and libraries allocate their workspaces
_capturing = threading.Lock()  # only one capture at a time in a process


class CaptureFailed(RuntimeError):
    """The step cannot be captured; the message says why."""


def capture(step: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """A function that does what `step` does and always returns the same tensor; on CUDA it replays a graph.

    `step` reads and writes memory at fixed addresses and may be repeated. On other devices it runs once, so that what
    cannot run fails here, and is returned unchanged.
    """
    if device.type != "cuda":
        step()
        return step
    with _capturing, torch.cuda.device(device):
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # also leaves it again when ending the capture fails
            for _ in range(WARM_UP):
                step()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                out = step()
        torch.cuda.current_stream().wait_stream(side)

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


class _Layer(CacheLayerMixin):
    """Keys and values of a layer, each [1, heads, length, head_dim] once the prompt has run.

    The prompt (position 0) attends only to itself, as in an empty dynamic cache; a step to the whole buffer.
    """

    keys: torch.Tensor
    values: torch.Tensor
    is_sliding = False

    def __init__(self, length: int, position: torch.Tensor) -> None:
        CacheLayerMixin.__init__(self)
        self.length, self.position = length, position  # int64 [], shared by all layers
        self.decode(False)

    def decode(self, now: bool) -> None:
        """Whether steps follow, whose masks must be made even where they hide nothing yet, or the prompt."""
        self.decodes = self.is_compileable = now

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def empty(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros(*like.shape[:2], self.length, like.shape[3])

        self.keys, self.values = empty(key_states), empty(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.decodes:
            self.keys.index_copy_(2, self.position.view(1), key_states)
            self.values.index_copy_(2, self.position.view(1), value_states)
            return self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for buffer, prompt in ((self.keys, key_states), (self.values, value_states)):
            buffer[:, :, : prompt.shape[2]] = prompt
            buffer[:, :, prompt.shape[2] :] = 0  # what is masked still must not be NaN
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length if self.decodes else query_length, 0

    def get_seq_length(self) -> Any:
        return self.position if self.decodes else 0

    def get_max_length(self) -> int:
        return self.length


class _QuantizedLayer(_Layer):
    """The same as codes. The prompt attends to its rounded entries, as in an empty quantized cache."""

    buffer: KVBuffer

    def __init__(
        self, length: int, position: torch.Tensor, scheme: KVScheme, scales: KVScales | None, seen: Seen
    ) -> None:
        super().__init__(length, position)
        self.scheme, self.scales, self.seen = scheme, scales, seen

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.buffer = KVBuffer(self.scheme, self.scales, key_states, self.length, self.seen)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.decodes:
            self.buffer.write(key_states, value_states, self.position)
            return self.buffer, self.buffer  # type: ignore[return-value]  # attention knows what it is
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.buffer.write(key_states, value_states, torch.zeros_like(self.position))
        return QuantizedLayer(self.scheme, self.scales).update(key_states, value_states)


class Buffers:
    """The memory of one sequence of at most `length` tokens and the captured step on it; reused by later sequences.

    quantized: what the model was told about its cache, if that is quantized.
    """

    def __init__(
        self,
        layers: int,
        length: int,
        device: torch.device,
        stamp: Any = None,
        quantized: Attached | None = None,
    ) -> None:
        self.length, self.device, self.stamp = length, device, stamp
        with torch.inference_mode(False):  # they are written to later, in whatever mode
            self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
            self.position = torch.zeros((), dtype=torch.int64, device=device)
            self.mask = torch.ones(1, length, dtype=torch.int64, device=device)  # OPT and ALiBi count it
        self.seen = Seen()
        if quantized is None:
            self.layers = [_Layer(length, self.position) for _ in range(layers)]
        else:
            scheme, scales = quantized.scheme, quantized.scales
            self.layers = [
                _QuantizedLayer(
                    length, self.position, scheme, None if scales is None else scales[i], self.seen
                )
                for i in range(layers)
            ]
        self.cache = Cache(layers=list(self.layers))
        self.replay: Callable[[], torch.Tensor] | None = None

    def prompt(self, model: PreTrainedModel, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        """Logits of tokens [1, M] at the beginning of the sequence."""
        for layer in self.layers:
            layer.decode(False)
        with torch.inference_mode(False), inference(model):
            out = model(
                input_ids=tokens.to(self.device), past_key_values=self.cache, use_cache=True, **options
            )
        for layer in self.layers:
            layer.decode(True)
        logits: torch.Tensor = out.logits
        return logits

    def step(self, model: PreTrainedModel, token: int, position: int) -> torch.Tensor:
        """Logits [1, 1, vocabulary] after `token` at `position`, in memory that the next step overwrites.

        CaptureFailed if this is the first step and it cannot be captured.
        """
        with torch.inference_mode(False), torch.no_grad():
            self.token.fill_(token)
            self.position.fill_(position)
            if self.replay is None:
                try:
                    # a weak reference: buffers are kept per model, not to keep it alive
                    step = partial(self._forward, weakref.ref(model))
                    with inference(model):
                        self.replay = capture(step, self.device)
                except Exception as error:
                    first = error.__context__ or error  # ending a broken capture is an error, too
                    line = next(iter(str(first).splitlines()), "")
                    raise CaptureFailed(f"{type(first).__name__}: {line}") from error
            return self.replay()

    def _forward(self, model: Callable[[], Any]) -> torch.Tensor:
        self.seen.forget()
        out = model()(
            input_ids=self.token,
            attention_mask=self.mask,
            position_ids=self.position.view(1, 1),
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: torch.Tensor = out.logits
        return logits
