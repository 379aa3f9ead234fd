"""Prefill and decode of one or several models, measured in rounds and held against the roofline of the machine.

Every round runs each cell (model, batch, context) once, models interleaved, after a warm-up round; the machine's read
bandwidth is measured before each round. Numbers are medians over rounds with their median absolute deviation (MAD);
ratios are medians of the ratios within each round. `quantkit bench` is the command.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.bench.machine import machine, where
from quantkit.bench.models import anatomy
from quantkit.bench.models.lanes import Sample, make_lane, measure
from quantkit.bench.models.profile import profile
from quantkit.bench.models.subject import Subject
from quantkit.bench.roofline import Roofline, as_hardware, read_bandwidth
from quantkit.bench.roofline import measure as measure_roofline
from quantkit.bench.rounds import Measured, interleave, spread
from quantkit.cost.hardware import Hardware
from quantkit.cost.roofline import Bound, Step, seconds

SCHEMA = "quantkit-bench/1"


@dataclass(frozen=True)
class Plan:
    """prompt: tokens of each sequence, behind `context` ones that are in the cache already. new: steps after it."""

    prompt: int
    new: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    rounds: int

    def cells(self) -> list[tuple[int, int]]:
        """(batch, context), the small ones first."""
        return [(batch, context) for context in self.contexts for batch in self.batches]

    def report(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "new": self.new,
            "batch": list(self.batches),
            "context": list(self.contexts),
            "rounds": self.rounds,
        }


def run(
    subjects: list[Subject],
    plan: Plan,
    write: Callable[[str], None] = print,
    memory: Callable[[Subject], dict[str, Any] | None] = lambda _: None,
) -> dict[str, Any]:
    """Measure every model in every cell; the report that docs/bench.md describes.

    memory: gives the peak memory of a model, measured apart.
    """
    device = subjects[0].model.device.type
    limits = measure_roofline(device)
    samples: dict[str, list[Sample]] = {}
    engines: dict[str, Callable[[], Measured]] = {}
    for batch, context in plan.cells():
        for subject in subjects:
            label = _label(subject, batch, context)
            samples[label] = []
            engines[label] = _engine(subject, batch, context, plan, samples[label])
    timed = interleave(engines, plan.rounds, lambda: read_bandwidth(device), write)
    limits = limits._replace(read=statistics.median(timed["read_bytes_per_s"]))
    hardware = as_hardware(device, limits)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": machine() | where(device),
        "settings": plan.report(),
        "roofline": limits.report() | {"read_rounds": timed["read_bytes_per_s"]},
        "models": [],
    }
    for subject in subjects:
        rows = [
            _row(
                subject, batch, context, plan, samples[_label(subject, batch, context)][1:], hardware, limits
            )
            for batch, context in plan.cells()
        ]
        report["models"].append(subject.report() | {"memory": memory(subject), "rows": rows})
    report["against"] = _against(subjects, plan, timed)
    return report


def _label(subject: Subject, batch: int, context: int) -> str:
    behind = f", behind {context}" if context else ""
    return f"{subject.name}, batch {batch}{behind}"


def _engine(
    subject: Subject, batch: int, context: int, plan: Plan, into: list[Sample]
) -> Callable[[], Measured]:
    """A function that runs a cell once, keeps the sample and returns its tokens/s."""
    vocabulary = subject.model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (batch, context + plan.prompt), generator=generator)
    runner = subject.runner(batch, plan.new)
    lane = make_lane(runner, tokens, context)
    given = _given(runner.way, context, plan)

    def once() -> Measured:
        sample = measure(lane, plan.new)
        into.append(sample)
        return {
            "prefill": batch * given / sample.prompt,
            "decode": batch * plan.new / sum(sample.steps),
        }

    return once


def _given(way: str, context: int, plan: Plan) -> int:
    """Tokens of a sequence that the timed prompt pass computes; a graph begins with the context."""
    return plan.prompt + (context if way == "graph" else 0)


def _row(
    subject: Subject,
    batch: int,
    context: int,
    plan: Plan,
    samples: list[Sample],
    hardware: Hardware,
    limits: Roofline,
) -> dict[str, Any]:
    """One cell of a model: what was measured, what the roofline allows, and where the time goes."""
    runner = subject.runner(batch, plan.new)
    model = anatomy.cost_model(subject.model, subject.weights)
    given = _given(runner.way, context, plan)
    middle = context + plan.prompt + plan.new // 2 + 1  # tokens in the cache at the average step
    before = anatomy.bounds(model, Step(given, context + plan.prompt, batch), hardware, subject.entry_bytes)
    steps = anatomy.bounds(model, Step(1, middle, batch), hardware, subject.entry_bytes)
    prefill = spread([batch * given / each.prompt for each in samples])
    decode = spread([batch * plan.new / sum(each.steps) for each in samples])
    every = sorted(second for each in samples for second in each.steps)
    step_bytes = sum(each.operator.count * each.operator.n_bytes for each in steps)
    median = statistics.median(every)
    parts = (
        _parts([each.step_parts for each in samples], plan.new)
        if samples[0].step_parts
        else profile(subject, runner, batch, context + plan.prompt)
    )
    return {
        "batch": batch,
        "context": context,
        "way": runner.way,
        "prefill": {
            "tokens": given,
            "tokens_per_s": prefill,
            "first_token_s": spread([each.prompt for each in samples]),
            **_ceiling(before, batch * given, prefill["median"]),
            "parts_s": _parts([each.prompt_parts for each in samples], 1),
        },
        "decode": {
            "steps": plan.new,
            "tokens_per_s": decode,
            "step_s": {"median": median, "p95": every[-(-95 * len(every) // 100) - 1]},
            "step_bytes": step_bytes,
            "bytes_per_s": step_bytes / median,
            "bandwidth_share": step_bytes / median / limits.read,
            **_ceiling(steps, batch, batch / median),
            "parts_s": parts,
        },
    }


def _ceiling(found: list[Bound], tokens: int, reached: float) -> dict[str, Any]:
    """What the roofline allows, the share that was reached, and which limit takes most of that time."""
    least = seconds(found)
    by_memory = sum(each.seconds for each in found if each.by == "memory")
    return {
        "ceiling_tokens_per_s": tokens / least,
        "roofline_share": reached * least / tokens,
        "bound": "memory" if 2 * by_memory > least else "compute",
    }


def _parts(samples: list[dict[str, float]], steps: int) -> dict[str, float] | None:
    """Median seconds of each part, of one step."""
    if not samples[0]:
        return None
    return {name: statistics.median(each[name] for each in samples) / steps for name in samples[0]}


def _against(subjects: list[Subject], plan: Plan, timed: dict[str, Any]) -> list[dict[str, Any]]:
    """How many times faster the first model is than each other one, within each round."""
    found = []
    first = subjects[0]
    for batch, context in plan.cells():
        own = timed["engines"][_label(first, batch, context)]
        for other in subjects[1:]:
            its = timed["engines"][_label(other, batch, context)]
            ratios = {
                kind: spread([a / b for a, b in zip(own[kind]["rounds"], its[kind]["rounds"], strict=True)])
                for kind in ("prefill", "decode")
            }
            found.append(
                {"model": first.name, "other": other.name, "batch": batch, "context": context, **ratios}
            )
    return found
