"""Collectors: small objects that see the input of one linear chunk by chunk and fill one field of `Statistics`.

All accumulate in fp32. `x` is [tokens, K] of the stream the layer will see; `full` the same tokens of the
full-precision stream, or None. Masked (padding) tokens are removed before a collector sees them.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

import torch

from quantkit.numerics.input_range import BINS, InputRange, count
from quantkit.numerics.statistics import Statistics

_TILE = 128
Key = TypeVar("Key", bound=Hashable)


class Collector(Protocol):
    """update() per chunk of tokens, finish() once."""

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None: ...

    def finish(self, statistics: Statistics) -> None: ...


class Hessian:
    """H = 2/tokens * X^T X, its tiles on and above the diagonal computed, then mirrored; and which inputs fired."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, features, device=device)
        self.fired = torch.zeros(features, dtype=torch.bool, device=device)
        self.edges = [*range(0, features, max(_TILE, -(-features // 8))), features]

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        for a, b in zip(self.edges, self.edges[1:], strict=False):
            self.sum[a:b, a:].addmm_(x[:, a:b].T, x[:, a:])
        self.fired |= (x != 0).any(0)

    def finish(self, statistics: Statistics) -> None:
        for a, b in zip(self.edges, self.edges[1:], strict=False):
            self.sum[b:, a:b] = self.sum[a:b, b:].T
        statistics.hessian = self.sum.mul_(2 / max(1, statistics.tokens))
        statistics.fired = self.fired


class Drift:
    """D = 2/tokens * (X_full - X)^T X: how far the quantized prefix has moved the inputs.

    Over the tokens the full-precision stream has; it may be shorter than the other.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, features, device=device)
        self.tokens = 0

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        if full is not None:
            self.sum.addmm_((full - x).T, x)
            self.tokens += x.shape[0]

    def finish(self, statistics: Statistics) -> None:
        statistics.drift = self.sum.mul_(2 / max(1, self.tokens))


class AbsMax:
    """max |x| per channel."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.amax = torch.zeros(features, device=device)

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        torch.maximum(self.amax, x.abs().amax(0), out=self.amax)

    def finish(self, statistics: Statistics) -> None:
        statistics.amax = self.amax


class MeanAbs:
    """mean |x| per channel (AWQ's statistic)."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, device=device)

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        self.sum += x.abs().sum(0)

    def finish(self, statistics: Statistics) -> None:
        statistics.mean_abs = self.sum / max(1, statistics.tokens)


class MeanSquare:
    """E[x^2] per channel, the weight of a column's rounding error."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, device=device)

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        self.sum += x.square().sum(0)

    def finish(self, statistics: Statistics) -> None:
        statistics.mean_square = self.sum / max(1, statistics.tokens)


class Sample:
    """Up to `rows` inputs, evenly spaced over each chunk, kept as they are."""

    def __init__(self, features: int, device: torch.device, rows: int = 512, chunks: int = 1) -> None:
        self.share = max(1, rows // chunks)
        self.parts: list[torch.Tensor] = []

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        self.parts.append(x[:: max(1, x.shape[0] // self.share)][: self.share].clone())

    def finish(self, statistics: Statistics) -> None:
        statistics.sample = torch.cat(self.parts)


class Range:
    """The smallest and the largest input, of all channels."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.low = torch.full((1,), torch.inf, device=device)
        self.high = -self.low

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        if x.numel():
            low, high = x.aminmax()
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def finish(self, statistics: Statistics) -> None:
        statistics.range = InputRange(self.low.cpu(), self.high.cpu())


class Counts(Range):
    """The same, and how often each value came."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        super().update(x, full)
        self.counts += count(x)

    def finish(self, statistics: Statistics) -> None:
        statistics.range = InputRange(self.low.cpu(), self.high.cpu(), self.counts.cpu())


COLLECTORS: dict[str, type] = {
    "hessian": Hessian,
    "drift": Drift,
    "amax": AbsMax,
    "mean_abs": MeanAbs,
    "mean_square": MeanSquare,
    "sample": Sample,
    "range": Range,
    "counts": Counts,
}


class Gatherer:
    """The collectors of one input, and the token mask applied before them."""

    def __init__(self, fields: frozenset[str], features: int, device: torch.device) -> None:
        self.collectors: list[Collector] = [COLLECTORS[f](features, device) for f in sorted(fields)]
        self.tokens = 0

    def update(
        self, x: torch.Tensor, full: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> None:
        """x, full: [..., K]; mask: bool [...], False for padding."""
        x = x.reshape(-1, x.shape[-1]).float()
        full = None if full is None else full.reshape(-1, full.shape[-1]).float()
        if mask is not None:
            keep = mask.reshape(-1)
            x, full = x[keep], None if full is None else full[keep]
        self.tokens += x.shape[0]
        for collector in self.collectors:
            collector.update(x, full)

    def finish(self) -> Statistics:
        statistics = Statistics(tokens=self.tokens)
        for collector in self.collectors:
            collector.finish(statistics)
        return statistics


class Gatherers(Generic[Key]):
    """One `Gatherer` for each of several inputs, made when an input is first seen."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of: dict[Key, Gatherer] = {}

    def update(
        self, key: Key, fields: frozenset[str], x: torch.Tensor, full: torch.Tensor | None = None
    ) -> None:
        """Take in x [..., K] of the input `key`, whose `fields` of `Statistics` are wanted; full as in `Gatherer`."""
        if key not in self._of:
            self._of[key] = Gatherer(fields, x.shape[-1], self._device)
        self._of[key].update(x, full)

    def finish(self) -> dict[Key, Statistics]:
        return {key: gatherer.finish() for key, gatherer in self._of.items()}
