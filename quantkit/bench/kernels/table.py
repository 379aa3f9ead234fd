"""Compare our kernels with those of installed libraries: `quantkit bench --products`.

One cell is (N, K, M). The weights of each op are copied until they fill 256 MB, so that every call reads its weight
from memory. All ops of a cell run interleaved, round after round. A time is the median over rounds, a ratio the median
of the ratios within each round. The read bandwidth is measured in the same cell, and an op whose result is wrong is
not timed.

To finish all shapes of a model in half an hour, calls of more than a second get three rounds without a warm-up, and
PyTorch's slower ops are skipped if a call would take more than five seconds.

On a GPU one round of an op replays a CUDA graph that holds one call per copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quantkit.bench.kernels.cell import Peers, cell
from quantkit.bench.kernels.lane import ROTATION, Loaded
from quantkit.bench.kernels.ops import BF16, INT4, LLAMA, cpu_ops, cuda_ops
from quantkit.bench.kernels.overhead import call_overhead
from quantkit.bench.machine import machine, native_available, where
from quantkit.bench.roofline import describe, measure

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {  # (N, K); the last of each: siblings fused
    "1.1b": ((2048, 2048), (5632, 2048), (2048, 5632), (2560, 2048), (11264, 2048)),
    "llama-3-8b": ((4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (28672, 4096)),
}
TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)


def shapes(names: Sequence[str]) -> list[tuple[int, int]]:
    """(N, K) of named models and of literal "4096x11008"s, each once, in order; ValueError for others."""
    found: dict[tuple[int, int], None] = {}
    for name in names:
        n, _, k = name.partition("x")
        if name in SHAPES:
            found |= dict.fromkeys(SHAPES[name])
        elif n.isdecimal() and k.isdecimal() and int(n) and int(k):
            found[int(n), int(k)] = None
        else:
            raise ValueError(f"unknown shape {name!r}; use NxK (4096x4096) or one of: {', '.join(SHAPES)}")
    return list(found)


def run(
    names: Sequence[str] = tuple(SHAPES),
    tokens: Sequence[int] = TOKENS,
    device: str = "cpu",
    only: Sequence[str] = (),
    rounds: int = 7,
    rotation: int = ROTATION,
    write: Callable[[str], None] = print,
    save: Callable[[dict[str, Any]], None] = lambda _report: None,
    peers: Peers | None = None,
) -> dict[str, Any]:
    """Measure all cells; each is printed by `write` and passed to `save` at once, so that none is lost.

    only: parts of op names. The two baselines of the ratios always run.
    """
    ops = cpu_ops() if device == "cpu" else cuda_ops()
    if only:
        ops = [op for op in ops if op.name in (BF16, INT4) or any(part in op.name for part in only)]
    roofline = measure(device, rounds=rounds)
    report: dict[str, Any] = {
        "schema": "quantkit-kernels/1",
        "machine": machine() | where(device),
        "rotation_bytes": rotation,
        "rounds": rounds,
        "roofline": roofline.report(),
        "cells": [],
    }
    write(describe(roofline))
    if device == "cpu" and native_available():
        report["call_overhead_us"] = call_overhead()
        write(
            "overhead of a call: "
            + ", ".join(f"{name} {us:.1f} us" for name, us in report["call_overhead_us"].items())
        )
    for n, k in shapes(names):
        loaded = [Loaded(op, n, k, device, rotation) for op in ops]
        for m in tokens:
            report["cells"].append(cell(loaded, n, k, m, roofline, device, rounds, rotation, peers=peers))
            write(table(report["cells"][-1]))
            save(report)
    return report


def table(measured: dict[str, Any]) -> str:
    """One cell as text, fastest first."""
    lines = [
        f"\n[{measured['n']}, {measured['k']}] M={measured['m']}   "
        f"read {measured['read_bytes_per_s'] / 1e9:.1f} GB/s",
        f"{'op':32}{'us':>10}{'min':>10}{'max':>10}{'read':>8}{'roofline':>10}{'x bf16':>8}{'x int4':>8}{'x llama':>8}",
    ]
    for row in sorted(measured["ops"], key=lambda row: row["us"]):
        ratios = [row["times_faster_than"].get(peer) for peer in (BF16, INT4, LLAMA)]
        lines.append(
            f"{row['op']:32}{row['us']:10.1f}{row['us_min']:10.1f}{row['us_max']:10.1f}"
            f"{row['share_of_read']:8.0%}{row['share_of_roofline']:10.0%}"
            + "".join(f"{ratio:8.2f}" if ratio else f"{'-':>8}" for ratio in ratios)
        )
    lines += [f"{name}: not timed, {reason}" for name, reason in measured["refused"].items()]
    return "\n".join(lines)
