"""Collectors: small objects that see the input of one linear chunk by chunk and fill one field of `Statistics`.

Each chunk is computed in fp32 and sums over chunks are kept in fp64. `x` is [tokens, K] of the stream the layer will
see; `full` the same tokens of the full-precision stream, or None. Masked (padding) tokens are removed before a
collector sees them.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import torch

from quantkit.calibration.ranks import ALONE, Ranks
from quantkit.numerics.input_range import BINS, InputRange, count
from quantkit.numerics.statistics import Statistics

_TILE = 128
SAMPLE_ROWS = 512
Key = TypeVar("Key", bound=Hashable)


class Collector(Protocol):
    """update() per chunk of tokens, join() once with what other processes have seen, finish() once."""

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None: ...

    def join(self, ranks: Ranks) -> None: ...

    def finish(self, statistics: Statistics) -> None: ...


class Sums:
    """Sums over chunks of matrix products, in fp64: what the order of the chunks adds or takes away lies below the last
    bit of fp32, so any number of processes finds the same.

    Rows `edges[i]:edges[i + 1]` are kept as one panel [rows, columns]; firsts: the first column of each panel.
    """

    def __init__(self, edges: list[int], firsts: list[int], device: torch.device) -> None:
        self.edges, self.firsts, self.features = edges, firsts, edges[-1]
        self.panels = [
            torch.zeros(b - a, self.features - first, dtype=torch.float64, device=device)
            for (a, b), first in zip(pairwise(edges), firsts, strict=True)
        ]
        widest = max(panel.numel() for panel in self.panels)
        self._product = torch.empty(widest, device=device)
        self._wide = torch.empty(widest, dtype=torch.float64, device=device)

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add left^T right of two [tokens, K], fp32."""
        for a, first, panel in zip(self.edges, self.firsts, self.panels, strict=False):
            product = self._product[: panel.numel()].view_as(panel)
            torch.mm(left[:, a : a + len(panel)].T, right[:, first:], out=product)
            panel.add_(self._wide[: panel.numel()].view_as(panel).copy_(product))

    def join(self, ranks: Ranks) -> None:
        for panel in self.panels:
            ranks.sum(panel)

    def finish(self, factor: float) -> torch.Tensor:
        """The sums times `factor`, fp32 [K, K], 0 where no panel reaches; each panel is freed when it is copied."""
        del self._product, self._wide
        whole = torch.zeros(self.features, self.features, device=self.panels[0].device)
        for a, first in zip(self.edges, self.firsts, strict=False):
            panel = self.panels.pop(0)
            whole[a : a + len(panel), first:] = panel.mul_(factor)
        return whole


def _edges(features: int) -> list[int]:
    return [*range(0, features, max(_TILE, -(-features // 8))), features]


class Hessian:
    """H = 2/tokens * X^T X, its tiles on and above the diagonal computed, then mirrored; and which inputs fired."""

    def __init__(self, features: int, device: torch.device) -> None:
        edges = _edges(features)
        self.sums = Sums(edges, edges[:-1], device)
        self.fired = torch.zeros(features, dtype=torch.bool, device=device)

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        self.sums.add(x, x)
        self.fired |= (x != 0).any(0)

    def join(self, ranks: Ranks) -> None:
        self.sums.join(ranks)
        fired = self.fired.to(torch.uint8)
        ranks.max(fired)
        self.fired = fired.bool()

    def finish(self, statistics: Statistics) -> None:
        edges = self.sums.edges
        hessian = self.sums.finish(2 / max(1, statistics.tokens))
        for a, b in pairwise(edges):
            hessian[b:, a:b] = hessian[a:b, b:].T
        statistics.hessian, statistics.fired = hessian, self.fired


class Drift:
    """D = 2/tokens * (X_full - X)^T X: how far the quantized prefix has moved the inputs.

    Over the tokens the full-precision stream has; it may be shorter than the other.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        edges = _edges(features)
        self.sums = Sums(edges, [0] * (len(edges) - 1), device)
        self.tokens = 0

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        if full is not None:
            self.sums.add(full - x, x)
            self.tokens += x.shape[0]

    def join(self, ranks: Ranks) -> None:
        self.sums.join(ranks)
        self.tokens = int(ranks.totals(self.tokens)[0])

    def finish(self, statistics: Statistics) -> None:
        statistics.drift = self.sums.finish(2 / max(1, self.tokens))


class AbsMax:
    """max |x| per channel."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.amax = torch.zeros(features, device=device)

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        torch.maximum(self.amax, x.abs().amax(0), out=self.amax)

    def join(self, ranks: Ranks) -> None:
        ranks.max(self.amax)

    def finish(self, statistics: Statistics) -> None:
        statistics.amax = self.amax


class MeanAbs:
    """mean |x| per channel (AWQ's statistic)."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        self.sum += x.abs().sum(0)

    def join(self, ranks: Ranks) -> None:
        ranks.sum(self.sum)

    def finish(self, statistics: Statistics) -> None:
        statistics.mean_abs = (self.sum / max(1, statistics.tokens)).float()


class MeanSquare:
    """E[x^2] per channel, the weight of a column's rounding error."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        self.sum += x.square().sum(0)

    def join(self, ranks: Ranks) -> None:
        ranks.sum(self.sum)

    def finish(self, statistics: Statistics) -> None:
        statistics.mean_square = (self.sum / max(1, statistics.tokens)).float()


class Range:
    """The smallest and the largest input, of all channels."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.low = torch.full((1,), torch.inf, device=device)
        self.high = -self.low

    def update(self, x: torch.Tensor, full: torch.Tensor | None) -> None:
        if x.numel():
            low, high = x.aminmax()
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def join(self, ranks: Ranks) -> None:
        ranks.min(self.low)
        ranks.max(self.high)

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

    def join(self, ranks: Ranks) -> None:
        super().join(ranks)
        ranks.sum(self.counts)

    def finish(self, statistics: Statistics) -> None:
        statistics.range = InputRange(self.low.cpu(), self.high.cpu(), self.counts.cpu())


COLLECTORS: dict[str, type] = {
    "hessian": Hessian,
    "drift": Drift,
    "amax": AbsMax,
    "mean_abs": MeanAbs,
    "mean_square": MeanSquare,
    "range": Range,
    "counts": Counts,
}


class Gatherer:
    """The collectors of one input, and the token mask applied before them."""

    def __init__(self, fields: frozenset[str], features: int, device: torch.device) -> None:
        self.fields, self.features = fields, features
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

    def finish(self, ranks: Ranks = ALONE) -> Statistics:
        """The statistics of the tokens that all processes have seen."""
        if ranks.size > 1:
            self.tokens = int(ranks.totals(self.tokens)[0])
            for collector in self.collectors:
                collector.join(ranks)
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
        if x.numel():  # of an expert that no token has reached there is none
            self._of[key].update(x, full)

    def finish(self, ranks: Ranks = ALONE) -> dict[Key, Statistics]:
        """The statistics of every input that a process has seen."""
        if ranks.size > 1:
            mine = [(key, each.fields, each.features) for key, each in self._of.items()]
            seen = {
                key: (fields, features) for found in ranks.gather(mine) for key, fields, features in found
            }
            self._of = {
                key: self._of.get(key) or Gatherer(fields, features, self._device)
                for key, (fields, features) in seen.items()
            }
        return {key: gatherer.finish(ranks) for key, gatherer in self._of.items()}


def extremes(
    inputs: list[torch.Tensor], columns: int, device: torch.device, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest of each column [K] of some inputs [..., K], of all processes."""
    low = torch.full((columns,), torch.inf, device=device)
    high = -low
    for x in inputs:
        flat = x.flatten(0, -2)
        if not len(flat):
            continue
        low, high = torch.minimum(low, flat.amin(0)), torch.maximum(high, flat.amax(0))
    ranks.min(low)
    ranks.max(high)
    return low, high


def sample(inputs: list[torch.Tensor], device: torch.device, ranks: Ranks) -> torch.Tensor | None:
    """At most SAMPLE_ROWS of some inputs [..., K], evenly spaced over those of all processes, fp32 [rows, K]; None if
    there are no inputs.

    inputs: one per chunk of windows. The chunks of the processes follow each other in turn, as they were dealt out.
    """
    flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
    counts = ranks.gather([len(x) for x in flat])
    order = sorted((chunk, rank) for rank, each in enumerate(counts) for chunk in range(len(each)))
    total = sum(map(sum, counts))
    if not total:
        return None
    step, begin, own = max(1, total // SAMPLE_ROWS), 0, []
    for chunk, rank in order:
        if rank == ranks.rank:
            stop = max(0, step * SAMPLE_ROWS - begin)
            own.append(flat[chunk][-begin % step : stop : step].float().cpu())
        begin += counts[rank][chunk]
    found = ranks.gather(own)
    return torch.cat([found[rank][chunk] for chunk, rank in order]).to(device)
