"""Prepare an op for timing: make and copy its weights, check its result, wrap a burst of calls in a function."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from quantkit.bench.kernels.ops import Op, Refused, Source, Weights

ROTATION = 256 << 20  # bytes
BURST = 0.02  # seconds of calls of one op in one round, one call at least
TOLERANCE = 0.03  # RMS error over RMS of the fp64 result; int8 activations alone give 0.01
ROWS_CHECKED, TOKENS_CHECKED = 64, 16
TOKENS_TRIED = 64  # by which the time of a call is estimated
LONG = 1.0  # seconds; calls that take longer are not repeated to wake things up


class Lane(NamedTuple):
    """One op of a cell: burst() runs some calls and returns the seconds per call.

    error: None if not checked. seconds: of a call before the timing, 0 if none was measured.
    """

    name: str
    kind: str
    n_bytes: int
    error: float | None
    burst: Callable[[], float]
    seconds: float = 0.0

    @property
    def long(self) -> bool:
        return self.seconds > LONG


def weight_bytes(weights: Weights) -> int:
    """Bytes a call has to read."""
    return sum(t.nbytes for part in weights.values() for t in _tensors(part))


def _tensors(part: Any) -> list[torch.Tensor]:
    if isinstance(part, torch.nn.Module):
        return [*part.parameters(), *part.buffers()]
    return [part] if isinstance(part, torch.Tensor) else []


def copies(op: Op, weights: Weights, rotation: int) -> list[Weights]:
    """Enough copies of `weights` to fill `rotation` bytes, at least two. Time does not depend on the values."""
    number = max(2, -(-rotation // weight_bytes(weights)))
    if op.place is not None:
        return op.place([weights] * number)
    return [weights] + [
        {name: copy.deepcopy(part) if _tensors(part) else part for name, part in weights.items()}
        for _ in range(number - 1)
    ]


def _cpu_burst(
    op: Op, rotating: list[Weights], x: torch.Tensor, seconds: float, expected: float
) -> tuple[Callable[[], float], float]:
    """(a burst of about `seconds`, the seconds of one call); `expected` is an estimate of the latter."""
    position = 0

    def calls(number: int) -> float:
        nonlocal position
        start = time.perf_counter()
        for i in range(position, position + number):
            op.run(x, rotating[i % len(rotating)])
        position += number
        return (time.perf_counter() - start) / number

    once = expected if expected > 2 * LONG else calls(1)
    if once <= LONG:  # the first call also woke things up
        once = calls(min(max(1, int(seconds / once)), len(rotating)))
    number = max(1, int(seconds / once))
    return lambda: calls(number), once


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
        return float(start.elapsed_time(stop)) / 1000 / len(rotating)

    replay()
    return replay


class Loaded:
    """An op with a random weight [N, K], which is made on first use and serves every number of tokens."""

    def __init__(self, op: Op, n: int, k: int, device: str = "cpu", rotation: int = ROTATION) -> None:
        self.op, self.n, self.k, self.device, self.rotation = op, n, k, device, rotation

    @cached_property
    def weights(self) -> tuple[list[Weights], torch.Tensor]:
        """(identical copies of the weight, its first rows [ROWS_CHECKED, K] in fp64)."""
        op = self.op
        source = Source.random(self.n, self.k, op.bits, op.group, self.device, op.number)
        rotating = copies(op, op.build(source, op.dtype), self.rotation)
        return rotating, source.dense(torch.float64, ROWS_CHECKED)

    def lane(self, m: int, burst: float = BURST) -> Lane:
        """The op prepared for M tokens; raises Refused with the reason if it cannot run or would take too long."""
        op = self.op
        reason = op.refuses(m, self.n, self.k)
        if reason:
            raise Refused(reason)
        if op.group and self.k % op.group:
            raise Refused(f"K={self.k} is not divisible by {op.group}")
        x = torch.randn(m, self.k, generator=torch.Generator().manual_seed(m)).to(self.device, op.dtype)
        error = self._relative_error(x)
        if not error <= TOLERANCE:
            raise Refused(f"wrong: relative RMS error {error:.3g}, more than {TOLERANCE}")
        x = op.prepare(x) if op.prepare else x
        rotating, _ = self.weights
        lane = partial(Lane, op.name, op.kind, weight_bytes(rotating[0]), error)
        if self.device != "cpu":
            return lane(_cuda_burst(op, rotating, x))
        expected = self._expected(x)
        if op.patience is not None and expected > op.patience:
            raise Refused(f"a call would take {expected:.1f} s, more than {op.patience:g}")
        return lane(*_cpu_burst(op, rotating, x, burst, expected))

    def _relative_error(self, x: torch.Tensor) -> float:
        """RMS error of the op over the RMS of the fp64 result, on some rows of the weight and of x [M, K]."""
        (weights, *_), rows = self.weights
        op, x = self.op, x[:TOKENS_CHECKED]
        if op.refuses(x.shape[0], self.n, self.k):
            x = x.repeat(-(-TOKENS_CHECKED * 2 // x.shape[0]), 1)
        y = op.run(op.prepare(x) if op.prepare else x, weights)
        if op.finish:
            y = op.finish(y, weights)
        exact = x.double() @ rows.T
        wrong = y[:, :ROWS_CHECKED].double() - exact
        return float(wrong.square().mean().sqrt() / exact.square().mean().sqrt())

    def _expected(self, x: torch.Tensor) -> float:
        """Estimated seconds of a call on x [M, K], from the faster of two calls on its first tokens."""
        some, spent = x[:TOKENS_TRIED], []
        for weights in self.weights[0][:2]:
            start = time.perf_counter()
            self.op.run(some, weights)
            spent.append(time.perf_counter() - start)
        return min(spent) * x.shape[0] / some.shape[0]
