"""One group of linears in a loaded block, quantized with one scheme or another, and run like that for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from quantkit.algorithms.catalog import algorithm
from quantkit.algorithms.config import RtnConfig
from quantkit.allocation.groups import Group
from quantkit.calibration.block_run import BlockRun
from quantkit.numerics.statistics import Statistics
from quantkit.numerics.weight import QuantizedWeight
from quantkit.pipeline.run import needs
from quantkit.plan import LayerPlan
from quantkit.scheme import Grid

NEAREST = RtnConfig(name="rtn", refit=0)
FAST = RtnConfig(name="rtn", range="minmax", refit=0)
KEPT = (
    1 << 30
)  # weights of experts whose codes are kept while a branch runs; more are rounded whenever they are read


class Tries(Protocol):
    """norm: the error of a weight of zeros."""

    @property
    def norm(self) -> float: ...

    def error(self, grid: Grid) -> float:
        """What rounding to a grid does to the outputs, or of experts to the weights."""

    def running(self, grid: Grid) -> Any:
        """A context in which the block runs with the weights of the last `error`, which was on the same grid."""


def fields_of(plans: Iterable[LayerPlan]) -> frozenset[str]:
    """The statistics that some linears are quantized and judged with. There is one stream, so no drift."""
    return (frozenset({"hessian"}).union(*(needs(plan) for plan in plans))) - {"drift"}


class LinearTries:
    """Linears outside experts. error: tr(dW H dW^T) / 2 of all, H of the original model's inputs.

    statistics: by siblings; nearest: round to nearest whatever the recipe's algorithm is. Linears that no text reaches
    have none, and count with the squared error of the weights.
    """

    def __init__(
        self, block: BlockRun, group: Group, statistics: Mapping[tuple[str, ...], Statistics], nearest: bool
    ) -> None:
        self.block, self.nearest = block, nearest
        planned = {layer.name for layer in group.layers}
        self._sets: list[tuple[list[str], Statistics]] = []
        found = [name for name in block.plans if block.plans[name].name in planned]
        for siblings, given in statistics.items():
            own = [name for name in siblings if name in found]
            for config in dict.fromkeys(block.plans[name].algorithm for name in own):
                self._sets.append(([n for n in own if block.plans[n].algorithm == config], given))
        reached = {name for names, _ in self._sets for name in names}
        self._sets += [([name], Statistics()) for name in found if name not in reached]
        self._last: dict[str, torch.Tensor] = {}

    @property
    def norm(self) -> float:
        return sum(_weighted(self._matrix(names), given) for names, given in self._sets)

    def _matrix(self, names: list[str]) -> torch.Tensor:
        return torch.cat([self.block.held[name].weight.data for name in names]).float()

    def error(self, grid: Grid) -> float:
        total, self._last = 0.0, {}
        for names, given in self._sets:
            weight, first = self._matrix(names), names[0]
            config = self.block.plans[first].algorithm
            if self.nearest or not given.tokens:
                config = NEAREST
            dtype = self.block.stored[f"{first}.weight"]
            outcome = algorithm(config.name).quantize(weight, _copy(given), grid, dtype, config)
            rounded = outcome.weight.dequantize(torch.float32)
            total += _weighted(rounded - weight, given)
            parts = rounded.split([self.block.held[name].out_features for name in names])
            self._last |= dict(zip(names, parts, strict=True))
        return total

    @contextmanager
    def running(self, grid: Grid) -> Iterator[None]:
        held = self.block.held
        try:
            for name, rounded in self._last.items():
                held[name].override = rounded
            yield
        finally:
            for name in self._last:
                held[name].override = None


def _copy(given: Statistics) -> Statistics:
    """Statistics that an algorithm may use up; without a second stream there is no drift."""
    hessian = None if given.hessian is None else given.hessian.clone()
    drift = None if given.hessian is None else torch.zeros_like(given.hessian)
    return Statistics(
        given.tokens, hessian, drift, given.fired, given.amax, given.mean_abs, given.mean_square
    )


def _weighted(weight: torch.Tensor, given: Statistics) -> float:
    """tr(W H W^T) / 2, or the squared norm without a Hessian."""
    if given.hessian is None:
        return float(weight.double().square().sum())
    return float(torch.linalg.vecdot(weight @ given.hessian.to(weight.dtype), weight).double().sum()) / 2


class ExpertTries:
    """The experts of a layer, read one at a time and rounded to nearest. error: squared error of all their weights."""

    def __init__(self, block: BlockRun, group: Group) -> None:
        planned = {layer.module for layer in group.layers}
        self._of = {}  # name inside the block -> the stage that reads it
        for stage in block.experts.values():
            for expert, plans in stage.plans.items():
                for name, plan in plans.items():
                    if plan.module in planned:
                        self._of[f"{stage.name}.{expert}.{name}"] = stage
        self._stages = list({id(stage): stage for stage in self._of.values()}.values())
        self._kept: dict[str, QuantizedWeight] = {}
        self._keeps = group.weights <= KEPT
        self.norm = 0.0
        for name, stage in self._of.items():
            self.norm += float(stage.read(name)[0].double().square().sum())

    def error(self, grid: Grid) -> float:
        total = 0.0
        self._kept.clear()
        for name, stage in self._of.items():
            weight = stage.read(name)[0]
            rounded = self._rounded(weight, grid)
            total += float(rounded.row_errors(weight.float())[0].double().sum())
            if self._keeps:
                self._kept[name] = rounded
        return total

    def _rounded(self, weight: torch.Tensor, grid: Grid) -> QuantizedWeight:
        config = NEAREST if self._keeps else FAST
        return algorithm("rtn").quantize(weight.float(), Statistics(), grid, weight.dtype, config).weight

    @contextmanager
    def running(self, grid: Grid) -> Iterator[None]:
        before = {id(stage): stage.read for stage in self._stages}

        def read(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
            stage = self._of.get(name)
            weight, bias = before[id(stage or self._stages[0])](name)
            if stage is None:
                return weight, bias
            rounded = self._kept.get(name) or self._rounded(weight, grid)
            return rounded.dequantize(torch.float32), bias

        for stage in self._stages:
            stage.read = read
        try:
            yield
        finally:
            for stage in self._stages:
                stage.read = before[id(stage)]
