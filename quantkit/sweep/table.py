"""The report of a sweep: its cells side by side, which of them nothing else beats, and which are really better."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantkit_eval.paired import Metric, WindowScores, compare_all

from quantkit.cost.model import find_model
from quantkit.models.headers import Headers
from quantkit.sweep.grid import Sweep
from quantkit.sweep.share import Planned

SCHEMA = "quantkit-sweep/1"
METRICS: tuple[Metric, ...] = ("kl", "nll")
Found = dict[str, Any]  # what `cell.run_cell` has written
Range = tuple[float, float]
# What each front weighs against the mean KL, from the least to the most that it may be: smaller is better.
AXES: dict[str, Callable[[Found], Range | None]] = {
    "size": lambda cell: (float(cell["size"]["quantized_bytes"]),) * 2,
    "memory": lambda cell: (float(cell["memory_bytes"]),) * 2,
    "decode": lambda cell: None if cell["speed"] is None else _slowness(cell["speed"]),
}
NOISE = 2  # median absolute deviations that the median of a few rounds may be off
_OF_CELL: tuple[str, ...] = (
    "status",
    "reason",
    "size",
    "evaluation",
    "per_window",
    "speed",
    "peak_rss_bytes",
)
_OF_CELL += ("peak_rss_measured_bytes", "seconds", "steps", "weights_sha256", "notes")


def report(
    name: str, sweep: Sweep, planned: Sequence[Planned], made: Mapping[str, Found], headers: Headers
) -> dict[str, Any]:
    """The report, schema `quantkit-sweep/1` (docs/sweep.md), of the cells that are finished."""
    asked = sweep.asked
    cells = [
        _cell(each, made[each.cell.id], headers, asked.context) for each in planned if each.cell.id in made
    ]
    finished = [cell for cell in cells if cell["status"] == "finished"]
    first = next((made[cell["id"]] for cell in finished), {})
    return {
        "schema": SCHEMA,
        "name": asked.name,
        "model": name,
        "context": asked.context,
        "evaluation": {
            key: first["evaluation"][key]
            for key in ("tokens", "windows", "context", "text", "text_sha256", "original")
        }
        if finished
        else None,
        "cells": cells,
        "missing": [each.cell.id for each in planned if each.cell.id not in made],
        "pareto": {axis: front(finished, axis) for axis in AXES},
        "decisions": decisions(finished, asked.alpha),
        "host": first.get("host") or {},
        "versions": first.get("versions") or {},
        "threads": first.get("threads"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cell(each: Planned, found: Found, headers: Headers, context: int) -> dict[str, Any]:
    """One cell of the report: what was asked, and what was found."""
    cache = round(find_model(each.plan, headers).cache_bytes(context, 1))
    cell: dict[str, Any] = {key: found.get(key) for key in _OF_CELL}
    cell["notes"] = cell["notes"] or []
    if found["status"] == "finished":
        cell["memory_bytes"] = cell["size"]["quantized_bytes"] + cache
    return cell | {
        "id": each.cell.id,
        "factors": dict(each.cell.factors),
        "recipe": each.cell.recipe.published(),
        "kv_cache": {
            "scheme": None if each.plan.kv is None else str(each.plan.kv),
            "bytes_at_context": cache,
            "bytes_per_token": cache / context,
        },
        "shared": {"weights_of": each.source if each.shares else None},
    }


def front(cells: Sequence[Mapping[str, Any]], axis: str) -> list[str]:
    """The cells that no other one beats in the mean KL and on an axis, by the axis; ids.

    A cell is beaten by one that is as good in both and better in one; of cells alike in both the first one stays. On an
    axis that is measured with noise, a cell must be better there beyond the noise than all with a smaller KL.
    """
    places = [
        (cell["evaluation"]["kl_mean"], value, number, cell["id"])
        for number, cell in enumerate(cells)
        if (value := AXES[axis](dict(cell))) is not None
    ]
    found: list[str] = []
    best = float("inf")
    for _, (least, most), _, name in sorted(places):
        if most < best:
            found.append(name)
        best = min(best, least)
    return found[::-1]


def _slowness(speed: Mapping[str, Any]) -> Range:
    """The time of a token in units of the original's, from the least to the most."""
    times, off = speed["decode_times_original"], NOISE * speed["decode_times_original_mad"]
    return 1 / (times + off), 1 / max(times - off, 1e-9)


def decisions(cells: Sequence[Mapping[str, Any]], alpha: float) -> dict[str, Any]:
    """Every pair of cells, by KL and by NLL, each corrected over all pairs of the table."""
    scores = {cell["id"]: WindowScores.from_json(cell["per_window"]) for cell in cells}
    pairs = [each.to_json() for metric in METRICS for each in compare_all(scores, metric, alpha)]
    return {
        "alpha": alpha,
        "correction": "holm",
        "comparisons": len(pairs) // len(METRICS),
        "pairs": pairs,
    }


def decided(result: Mapping[str, Any], a: str, b: str, metric: str = "kl") -> dict[str, Any] | None:
    """The pair of two cells as a beside b, None if there is none such."""
    for pair in result["decisions"]["pairs"]:
        if pair["metric"] == metric and {pair["a"], pair["b"]} == {a, b}:
            return dict(pair) if pair["a"] == a else _turned(pair)
    return None


def _turned(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A pair, the other way round."""
    opposite = {"yes": "no", "no": "yes", "undecided": "undecided"}
    turned = {"a": pair["b"], "b": pair["a"], "difference": -pair["difference"]}
    return dict(pair) | turned | {"better": opposite[pair["better"]]}
