"""An op made ready to be timed on one (N, K, M): checked, its weights copied, a burst of calls as a function."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from quantkit.bench.ops import Op, Refused, Source, Weights

ROTATION = 256 << 20  # bytes
BURST = 0.02  # seconds of calls of one op in one round, one call at least
TOLERANCE = 0.03  # RMS error over RMS of the fp64 result; int8 activations alone give 0.01
ROWS_CHECKED, TOKENS_CHECKED = 64, 16


class Lane(NamedTuple):
    """What is timed in a cell: burst() runs some calls and gives seconds per call. error: None if not checked."""

    name: str
    kind: str
    n_bytes: int
    error: float | None
    burst: Callable[[], float]


def weight_bytes(weights: Weights) -> int:
    """Bytes a call has to read."""
    return sum(t.nbytes for part in weights.values() for t in _tensors(part))


def _tensors(part: Any) -> list[torch.Tensor]:
    if isinstance(part, torch.nn.Module):
        return [*part.parameters(), *part.buffers()]
    return [part] if isinstance(part, torch.Tensor) else []


def copies(op: Op, weights: Weights, rotation: int) -> list[Weights]:
    """As many copies of `weights` as fill `rotation` bytes, two at least; the values do not matter for time."""
    number = max(2, -(-rotation // weight_bytes(weights)))
    if op.place is not None:
        return op.place([weights] * number)
    return [weights] + [
        {name: copy.deepcopy(part) if _tensors(part) else part for name, part in weights.items()}
        for _ in range(number - 1)
    ]


def relative_error(op: Op, source: Source, weights: Weights, x: torch.Tensor) -> float:
    """RMS error of the op over the RMS of the fp64 result, on some rows of the weight and of x [M, K]."""
    x = x[:TOKENS_CHECKED]
    if op.refuses(x.shape[0], source.n, source.k):
        x = x.repeat(-(-TOKENS_CHECKED * 2 // x.shape[0]), 1)
    given = op.prepare(x) if op.prepare else x
    y = op.run(given, weights)
    if op.finish:
        y = op.finish(y, weights)
    exact = x.double() @ source.dense(torch.float64, ROWS_CHECKED).T
    wrong = y[:, :ROWS_CHECKED].double() - exact
    return float(wrong.square().mean().sqrt() / exact.square().mean().sqrt())


def _cpu_burst(op: Op, rotating: list[Weights], x: torch.Tensor, seconds: float) -> Callable[[], float]:
    position = 0

    def calls(number: int) -> float:
        nonlocal position
        start = time.perf_counter()
        for i in range(position, position + number):
            op.run(x, rotating[i % len(rotating)])
        position += number
        return (time.perf_counter() - start) / number

    number = max(1, int(seconds / calls(1)))
    number = max(1, int(seconds / calls(min(number, len(rotating)))))  # the first call also woke things up
    return lambda: calls(number)


def _cuda_burst(op: Op, rotating: list[Weights], x: torch.Tensor) -> Callable[[], float]:
    for weights in rotating[:3]:
        op.run(x, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weights in rotating:
            op.run(x, weights)

    def replay() -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000 / len(rotating)

    replay()
    return replay


def ready(op: Op, n: int, k: int, m: int, device: str, rotation: int, burst: float) -> Lane:
    """The lane of an op whose result is right; Refused with the reason otherwise."""
    reason = op.refuses(m, n, k)
    if reason:
        raise Refused(reason)
    if op.group and k % op.group:
        raise Refused(f"K={k} is not divisible by {op.group}")
    random = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=random).to(device, op.dtype)
    source = Source.random(n, k, op.bits, op.group, device)
    weights = op.build(source, op.dtype)
    error = relative_error(op, source, weights, x)
    if not error <= TOLERANCE:
        raise Refused(f"wrong: relative RMS error {error:.3g}, more than {TOLERANCE}")
    rotating = copies(op, weights, rotation)
    given = op.prepare(x) if op.prepare else x
    timed = _cpu_burst(op, rotating, given, burst) if device == "cpu" else _cuda_burst(op, rotating, given)
    return Lane(op.name, op.kind, weight_bytes(weights), error, timed)
