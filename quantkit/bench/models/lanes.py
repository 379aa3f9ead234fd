"""B sequences of one model, ready to be timed: natively, in a CUDA graph, or in transformers.

A lane takes the same steps as `quantkit.generate`, greedily, on random tokens that are the same for every model; but
several sequences always take one forward in transformers, also where `generate` runs them one by one, as with a
quantized cache.
"""

from __future__ import annotations

import inspect
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from quantkit_eval.model import device_of, inference

from quantkit.errors import NumericalError
from quantkit.runtime import NativeDecoder, Runner
from quantkit.runtime.native import Sequence


class Lane(Protocol):
    """B sequences. `ready`: their context is in the cache, and nothing else; the rest is timed."""

    def ready(self) -> None: ...

    def prompt(self) -> torch.Tensor:
        """Logits [B, vocabulary] after the prompt."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, vocabulary] after one more token each; tokens: int64 [B]."""

    def timed(self) -> AbstractContextManager[list[dict[str, float]]]:
        """Seconds by part of what runs inside; an empty list where they are not known."""


class NativeLane:
    """Prompts one after the other, steps together; a context is computed once and kept."""

    def __init__(self, decoder: NativeDecoder, tokens: torch.Tensor, context: int) -> None:
        self._decoder, self._tokens, self._context = decoder, tokens, context
        self._sequences: list[Sequence] = []

    def ready(self) -> None:
        if not self._context or not self._sequences:
            self._sequences = [self._decoder.start() for _ in self._tokens]
            for sequence, row in zip(self._sequences, self._tokens, strict=True):
                if self._context:
                    sequence.append(row[: self._context])
        for sequence in self._sequences:
            sequence.truncate(self._context)

    def prompt(self) -> torch.Tensor:
        pairs = zip(self._sequences, self._tokens, strict=True)
        return torch.cat([sequence.append(row[self._context :]) for sequence, row in pairs])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        if len(self._sequences) == 1:
            return self._sequences[0].append(tokens)
        return Sequence.step(self._sequences, tokens)

    def timed(self) -> AbstractContextManager[list[dict[str, float]]]:
        return _Timed(self._sequences)


class _Timed(ExitStack):
    """The parts of the steps of several sequences."""

    def __init__(self, sequences: list[Sequence]) -> None:
        super().__init__()
        self._of = sequences

    def __enter__(self) -> list[dict[str, float]]:  # type: ignore[override]
        super().__enter__()
        return [self.enter_context(each.timed()) for each in self._of]


class ModelLane:
    """A model of transformers or a captured graph. A graph begins with the prompt, so a context is part of it."""

    def __init__(self, runner: Runner, tokens: torch.Tensor, context: int) -> None:
        self._model: Any = runner.model
        self._device = device_of(runner.model)
        self._tokens, self._context = tokens.to(self._device), 0 if runner.way == "graph" else context
        self._cache: Any = None
        known = inspect.signature(runner.model.forward).parameters
        self._kept = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def ready(self) -> None:
        self._cache = None
        if self._context:
            self._forward(self._tokens[:, : self._context])

    def prompt(self) -> torch.Tensor:
        return self._forward(self._tokens[:, self._context :])

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._forward(tokens[:, None])

    def timed(self) -> AbstractContextManager[list[dict[str, float]]]:
        return nullcontext([])

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        with inference(self._model):
            out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._kept)
        self._cache = out.past_key_values
        logits: torch.Tensor = out.logits[:, -1]
        return logits


def make_lane(runner: Runner, tokens: torch.Tensor, context: int) -> Lane:
    """The lane of a runner. tokens: int64 [B, context + prompt]."""
    if isinstance(runner.model, NativeDecoder):
        return NativeLane(runner.model, tokens, context)
    return ModelLane(runner, tokens, context)


@dataclass
class Sample:
    """One round of a lane. prompt: seconds until every sequence has its first token. steps: seconds of each step."""

    prompt: float
    steps: list[float]
    prompt_parts: dict[str, float] = field(default_factory=dict)
    step_parts: dict[str, float] = field(default_factory=dict)


def measure(lane: Lane, new: int) -> Sample:
    """The prompt into the cache, then `new` steps; NumericalError for logits that are not finite."""
    lane.ready()
    with lane.timed() as prompt_parts:
        start = time.perf_counter()
        logits = lane.prompt()
        tokens = logits.argmax(-1)
        tokens.tolist()  # waits for the device
        prompt = time.perf_counter() - start
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError("the model gives non-finite logits; it is broken, or its dtype too narrow")
    steps = []
    with lane.timed() as step_parts:
        for _ in range(new):
            start = time.perf_counter()
            tokens = lane.step(tokens).argmax(-1)
            tokens.tolist()
            steps.append(time.perf_counter() - start)
    return Sample(prompt, steps, _sum(prompt_parts), _sum(step_parts))


def _sum(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in parts) for name in (parts[0] if parts else ())}
