"""`graphed(model)`: a model on a GPU whose decode step is captured in a CUDA graph, or the reason why it runs eager.

In Python one step of a 32-layer model launches about a thousand kernels, which takes longer than the kernels. Here the
prompt runs as transformers runs it, and its keys and values go to buffers as long as the sequence can get. Then one
step is captured, with the token and its position read from memory: a replay is one launch. Attention goes over the
whole buffer, masked; sliding windows are masks too, because a window that moves in a fixed buffer would need another
graph when it fills. Picking a token stays outside.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from quantkit_eval.model import device_of, inference
from torch import nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from quantkit.errors import ModelError

ROUND = 64  # buffers are a multiple of this many tokens long
WARM_UP = 3  # steps before the capture: kernels are compiled, libraries get their workspaces
_capturing = threading.Lock()  # a process has one capture under way at most


class CaptureFailed(RuntimeError):
    """The step cannot be captured; the message says why."""


def capture(step: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """A function that does what `step` does and returns the same tensor every time; on CUDA the replay of a graph.

    `step` reads and writes memory at fixed addresses and may be repeated. On other devices it is run once, so that
    what cannot run fails here, and returned as it is.
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
    """Keys and values of a layer, each [1, heads, length, head_dim] once the prompt is there.

    The prompt (position 0) sees only itself, as in an empty dynamic cache; a step the whole buffer.
    """

    is_sliding = False

    def __init__(self, length: int, position: torch.Tensor) -> None:
        super().__init__()
        self.length, self.position = length, position  # int64 [], shared by all layers
        self.decodes = False

    @property
    def is_compileable(self) -> bool:
        """Whether masks must be made even where they hide nothing yet."""
        return self.decodes

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

    def get_seq_length(self) -> int | torch.Tensor:
        return self.position if self.decodes else 0

    def get_max_length(self) -> int:
        return self.length


class Buffers:
    """The memory of one sequence of at most `length` tokens and the captured step on it; reused by later sequences."""

    def __init__(self, layers: int, length: int, device: torch.device, stamp: Any = None) -> None:
        self.length, self.device, self.stamp = length, device, stamp
        with torch.inference_mode(False):  # they are written to later, in whatever mode
            self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
            self.position = torch.zeros((), dtype=torch.int64, device=device)
            self.mask = torch.ones(1, length, dtype=torch.int64, device=device)  # OPT and ALiBi count it
        self.layers = [_Layer(length, self.position) for _ in range(layers)]
        self.cache = Cache(layers=self.layers)
        self.replay: Callable[[], torch.Tensor] | None = None

    def prompt(self, model: nn.Module, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        """Logits of tokens [1, M] at the beginning of the sequence."""
        for layer in self.layers:
            layer.decodes = False
        with torch.inference_mode(False), inference(model):
            out = model(
                input_ids=tokens.to(self.device), past_key_values=self.cache, use_cache=True, **options
            )
        for layer in self.layers:
            layer.decodes = True
        return out.logits

    def step(self, model: nn.Module, token: int, position: int) -> torch.Tensor:
        """Logits [1, 1, vocabulary] after `token` at `position`, in memory that the next step overwrites.

        CaptureFailed if this is the first step and it cannot be captured.
        """
        with torch.inference_mode(False), torch.no_grad():
            self.token.fill_(token)
            self.position.fill_(position)
            if self.replay is None:
                try:
                    with inference(
                        model
                    ):  # a weak reference: buffers are kept per model, not to keep it alive
                        self.replay = capture(partial(self._forward, weakref.ref(model)), self.device)
                except Exception as error:
                    first = error.__context__ or error  # ending a broken capture is an error, too
                    line = next(iter(str(first).splitlines()), "")
                    raise CaptureFailed(f"{type(first).__name__}: {line}") from error
            return self.replay()

    def _forward(self, model: Callable[[], Any]) -> torch.Tensor:
        return model()(
            input_ids=self.token,
            attention_mask=self.mask,
            position_ids=self.position.view(1, 1),
            past_key_values=self.cache,
            use_cache=True,
        ).logits


class Sequence:
    """One sequence: its tokens and its buffers, which go back to the model's shelf when it is dropped."""

    def __init__(self, buffers: Buffers, tokens: list[int]) -> None:
        self.buffers, self.tokens = buffers, tokens

    def __len__(self) -> int:
        return len(self.tokens)


class GraphDecoder:
    """A causal LM as an eager prompt and one captured step, for one sequence of a prompt and `room` new tokens.

    Can be called like the model; `past_key_values` is then the `Sequence`, whose logits live until the next call.
    If the first step cannot be captured, a warning says why, and this and later ones run as transformers runs them.
    """

    def __init__(self, model: nn.Module, room: int) -> None:
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
    """What is kept of a model between sequences: at most one set of buffers with its graph."""

    def __init__(self) -> None:
        self.failed: str | None = None
        self._lock = threading.Lock()
        self._buffers: Buffers | None = None

    def take(self, model: nn.Module, tokens: int, device: torch.device) -> Buffers:
        """Buffers for `tokens` tokens: the kept ones if they fit, not twice too long and made for these weights."""
        length = -(-tokens // ROUND) * ROUND
        stamp = _stamp(model)
        with self._lock:
            kept, self._buffers = self._buffers, None
        if kept is not None and length <= kept.length <= 2 * length and kept.stamp == stamp:
            return kept
        del kept  # its memory first
        return Buffers(len(_cache_layers(model)), length, device, stamp)

    def give_back(self, buffers: Buffers) -> None:
        if buffers.replay is not None:
            with self._lock:
                self._buffers = buffers


_shelves: weakref.WeakKeyDictionary[nn.Module, _Shelf] = weakref.WeakKeyDictionary()


def _shelf(model: nn.Module) -> _Shelf:
    return _shelves.setdefault(model, _Shelf())


def _stamp(model: nn.Module) -> Any:
    """Changes when a captured step would read memory that is no longer the model's, or should run other code."""
    addresses = tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))
    return model.config._attn_implementation, addresses


def _cache_layers(model: nn.Module) -> list[Any]:
    return DynamicCache(config=model.config).layers


def graphed(model: nn.Module, room: int) -> GraphDecoder | str:
    """The decoder of a causal LM for `room` new tokens, or why it decodes eager."""
    places = {t.device for t in (*model.parameters(), *model.buffers())}
    if any(place.type != "cuda" for place in places):
        where = "parts of it are offloaded" if len(places) > 1 else f"it is on {device_of(model)}"
        return f"CUDA graphs need the whole model on a CUDA device; {where}"
    if len(places) > 1:
        return f"the model is spread over {len(places)} devices"
    return unfit(model) or _shelf(model).failed or GraphDecoder(model, room)


def unfit(model: nn.Module) -> str | None:
    """Why a model has no step of fixed shapes, wherever it is; None if it should have one."""
    name, attention = type(model).__name__, model.config._attn_implementation
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers does not support a static cache for {name}"
    if attention not in ("sdpa", "eager"):
        return f"{attention} attention is not masked; load the model with sdpa"
    layers = _cache_layers(model)
    foreign = {type(layer).__name__ for layer in layers} - {
        DynamicLayer.__name__,
        DynamicSlidingWindowLayer.__name__,
    }
    if foreign or not layers:
        return f"{name} has a cache of another kind: {', '.join(sorted(foreign)) or 'no layers'}"
    kinds = [getattr(part, "rope_type", None) for part in model.modules()]  # gemma 3: one per kind of layer
    kinds = {kind for each in kinds for kind in (each.values() if isinstance(each, dict) else [each])}
    if moving := kinds & {"dynamic", "longrope"}:
        return f"its {moving.pop()} rotary embedding changes with the length"
    return None
