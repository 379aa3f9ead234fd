"""Run engines interleaved: each once per round, in turning order; medians over rounds, ratios within a round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping
from typing import Any

from quantkit.bench.roofline import read_bandwidth

Measured = dict[str, float]  # {"decode": tokens/s, "prefill": tokens/s}


def interleave(
    engines: Mapping[str, Callable[[], Measured]],
    rounds: int,
    window: Callable[[], float] = read_bandwidth,
    write: Callable[[str], None] = print,
    unit: str = "tokens/s",
    warm: Collection[str] = (),
    keep: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Run every engine once per round, after a warm-up round without those in `warm`, which warm up by themselves.

    keep: gets the result so far after every round, so that a run that is cut short leaves something.
    {"read_bytes_per_s": [..], "engines": {name: {"decode": {"median", "min", "max", "rounds"}, "prefill": ..}}}
    """
    reads: list[float] = []
    names = list(engines)
    seen: dict[str, list[Measured]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        if number:
            reads.append(window())
        for name in names if number % 2 else reversed(names):
            if number == 0 and name in warm:
                continue
            measured = engines[name]()
            if number:
                seen[name].append(measured)
                speeds = ", ".join(f"{kind} {speed:.4g}" for kind, speed in measured.items())
                write(f"round {number}  {name:24} {speeds} {unit}")
        if number and keep is not None:
            keep(_summed(reads, seen))
    return _summed(reads, seen)


def _summed(reads: list[float], seen: Mapping[str, list[Measured]]) -> dict[str, Any]:
    rows = {
        name: {kind: spread([m[kind] for m in found]) for kind in found[0]} for name, found in seen.items()
    }
    return {"read_bytes_per_s": list(reads), "engines": rows}


def spread(values: list[float]) -> dict[str, Any]:
    """Median and noise; mad: the median absolute deviation from the median."""
    middle = statistics.median(values)
    return {
        "median": middle,
        "mad": statistics.median(abs(value - middle) for value in values),
        "min": min(values),
        "max": max(values),
        "rounds": values,
    }


def ratio(report: Mapping[str, Any], kind: str, a: str, b: str) -> float | None:
    """Median over rounds of how many times faster `a` is than `b`; None if one of them did not run."""
    rows = report["engines"]
    if a not in rows or b not in rows:
        return None
    pairs = zip(rows[a][kind]["rounds"], rows[b][kind]["rounds"], strict=True)
    return float(statistics.median(x / y for x, y in pairs))


def ratios(report: Mapping[str, Any], first: str, others: Mapping[str, Any] | list[str]) -> dict[str, Any]:
    """{other engine: {kind: how many times faster `first` is}} for the engines that ran."""
    rows = report["engines"]
    return {
        other: {kind: ratio(report, kind, first, other) for kind in rows[first] if kind in rows[other]}
        for other in others
        if other != first and other in rows and first in rows
    }
