"""Where the time of a step in transformers goes, by hooks around its linears and its attention.

Hooks slow a step down, and on a GPU each waits for the device, so this is a pass of its own that gives shares. A
captured graph has no modules to hook.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from quantkit_eval.model import inference
from torch import nn

from quantkit.bench.models.subject import Subject
from quantkit.layers.quant_linear import QuantLinear
from quantkit.runtime import Runner

STEPS = 4


class _Clock:
    """Seconds inside modules of some kinds; a module inside another of the same kind counts once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._starts: dict[str, list[float]] = {}
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def watch(self, module: nn.Module, kind: str) -> list[Any]:
        """The handles of two hooks."""
        starts = self._starts.setdefault(kind, [])
        self.seconds.setdefault(kind, 0.0)

        def begin(*_: Any) -> None:
            starts.append(self.now())

        def end(*_: Any) -> None:
            taken = self.now() - starts.pop()
            if not starts:
                self.seconds[kind] += taken

        return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


def profile(subject: Subject, runner: Runner, batch: int, length: int) -> dict[str, float] | None:
    """Seconds of a decode step behind `length` tokens, by part; None of a way whose parts cannot be seen."""
    if runner.way != "eager":
        return None
    model = subject.model
    clock, head = _Clock(model.device), model.get_output_embeddings()
    ids = torch.zeros(batch, length, dtype=torch.int64, device=model.device)
    with inference(model):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    handles: list[Any] = []
    for module, kind in _kinds(model, head):
        handles += clock.watch(module, kind)
    try:
        with inference(model):
            start = clock.now()
            for _ in range(STEPS):
                cache = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
            whole = clock.now() - start
    finally:
        for handle in handles:
            handle.remove()
    return _shared_out({name: value / STEPS for name, value in clock.seconds.items()}, whole / STEPS)


def _shared_out(seconds: dict[str, float], whole: float) -> dict[str, float]:
    """Parts that add up to the whole: attention and experts without the linears inside them, then the rest."""
    linears, inside = seconds.get("linears", 0.0), seconds.get("linears of attention", 0.0)
    found = {
        "linears": linears + inside,
        "experts": seconds.get("experts", 0.0),
        "head": seconds.get("head", 0.0),
        "attention": max(0.0, seconds.get("attention", 0.0) - inside),
    }
    return found | {"rest": max(0.0, whole - sum(found.values()))}


def _kinds(model: nn.Module, head: Any) -> Iterator[tuple[nn.Module, str]]:
    """Modules to watch. Experts count with the linears inside them, attention without."""
    attention, experts = list[str](), list[str]()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{each}.") for each in attention)
        kind = type(module).__name__
        if any(name.startswith(f"{each}.") for each in experts):
            continue
        if module is head:
            yield module, "head"
        elif kind.endswith("Experts"):
            experts.append(name)
            yield module, "experts"
        elif isinstance(module, QuantLinear | nn.Linear) or kind == "Conv1D":
            yield module, "linears of attention" if inside else "linears"
        elif kind.endswith("Attention") and not inside:
            attention.append(name)
            yield module, "attention"
