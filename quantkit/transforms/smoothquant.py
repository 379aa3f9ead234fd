"""SmoothQuant (Xiao et al., arXiv 2211.10438): the range of large input channels moves into the weights.

For linears fed by one x, channel j of x is divided by s_j and column j of their weights multiplied by it, with
s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) (equation 4). Inputs rounded to 8 bits lose little then, and weights, which
have no such channels, can bear the rest. A transform: it returns ordinary weights, any algorithm may quantize them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.numerics.inputs import input_scale, round_inputs
from quantkit.numerics.statistics import dead_note
from quantkit.scheme import Grid
from quantkit.transforms.config import SmoothQuantConfig
from quantkit.transforms.equalize import channel_maxima, scales
from quantkit.transforms.groups import left_out, planned, rounded
from quantkit.transforms.registry import EVERY, register

if TYPE_CHECKING:
    from quantkit.calibration.block_run import BlockRun, Observed
    from quantkit.structure.fold import ScalingGroup

INSTEAD = "leave out the smoothquant transform"


@register("smoothquant", windows=lambda config: config.windows or EVERY)
@torch.no_grad()
def apply(run: BlockRun, config: SmoothQuantConfig) -> list[dict[str, Any]]:
    """Smooth the inputs of the planned linears of one block. One report per scaling group that was looked at.

    Later groups come first: the fold of a group divides rows of its producer, which is a consumer of an earlier group
    and counts there with the weights it has in the end.
    """
    for held in run.held.values():
        held.weight.data = held.weight.data.float()
    proved, refused = run.scaling_groups(INSTEAD)
    groups = [g for g in proved if planned(g, run.plans)]
    input_max = run.inputs_of([g.consumers[0] for g in groups], "amax", config.windows)
    # one pass serves all groups: a group's own fold is all that changes its consumers' input
    names = {n for g in groups for n in (g.inspect, g.consumers[0])} if config.alpha == "auto" else set()
    seen = run.observe(names, config.search_windows) if names else {}
    report = [_smooth(run, g, input_max[g.consumers[0]], seen, config) for g in reversed(groups)][::-1]
    others = left_out(run.trace.siblings, proved, refused, run.plans)
    return report + [{"alpha": None} | entry for entry in others]


def _smooth(
    run: BlockRun, group: ScalingGroup, input_max: torch.Tensor, seen: Observed, config: SmoothQuantConfig
) -> dict[str, Any]:
    """Fold the scales of one group. input_max: [K], max|x| of every column of its consumers."""
    channels, weight_max = channel_maxima(run, group, input_max)
    candidates = {alpha: scales(channels, weight_max, alpha) for alpha in config.strengths(run.model_type)}
    alpha: float | None = next(iter(candidates))
    report: dict[str, Any] = {"producer": group.producer, "consumers": list(group.consumers)}
    if config.alpha == "auto":
        losses = _losses(run, group, candidates | {None: torch.ones_like(channels)}, seen)
        alpha = min(losses, key=lambda each: losses[each])
        report |= {"loss": losses[alpha], "identity_loss": losses[None]}
    report |= {"alpha": alpha, "input_max": float(channels.amax())}
    if note := dead_note(int((channels == 0).sum()), len(channels), "not smoothed"):
        report["note"] = note
    if alpha is None:
        return report
    s = candidates[alpha]
    report["smoothed_max"] = float((channels / s).amax())
    return report | {"output_change": run.fold(group, s, INSTEAD)}


# the search of alpha -----------------------------------------------------------------------------------------------


def _losses(
    run: BlockRun, group: ScalingGroup, candidates: Mapping[float | None, torch.Tensor], seen: Observed
) -> dict[float | None, float]:
    """Mean squared error of the inspected module's output for each candidate s, weights and inputs rounded."""
    run.select(full=True)
    inspected = run.module.get_submodule(group.inspect) if group.inspect else run.module
    inputs = [args[0] for args, _, _ in seen[group.consumers[0]]]
    range_ = run.extremes(inputs, run.held[group.consumers[0]].in_features)
    found: dict[float | None, float] = {}
    for alpha, s in candidates.items():
        columns = s if group.expand is None else s[group.expand.to(s.device)]
        total, count = 0.0, 0.0
        with _rounded(run, group.consumers, columns, range_):
            for args, kwargs, wanted in seen[group.inspect]:
                total += float((run.output(inspected, args, kwargs) - wanted).square().sum())
                count += wanted.numel()
        total, count = run.ranks.totals(total, count)
        found[alpha] = total / count
    return found


@contextmanager
def _rounded(
    run: BlockRun,
    consumers: tuple[str, ...],
    columns: torch.Tensor,
    range_: tuple[torch.Tensor, torch.Tensor],
) -> Iterator[None]:
    """Inside, consumers multiply x / columns and W diag(columns), both on their grids. range_: min and max [K] of x."""
    handles = []
    for name in consumers:
        held, scheme = run.held[name], run.plans[name].scheme
        held.override = rounded(held.weight * columns, scheme.weights, run.stored[f"{name}.weight"])
        handles.append(held.register_forward_pre_hook(_rounding(scheme.inputs, columns, range_)))
    try:
        yield
    finally:
        for name, handle in zip(consumers, handles, strict=True):
            run.held[name].override = None
            handle.remove()


def _rounding(
    grid: Grid | None, columns: torch.Tensor, range_: tuple[torch.Tensor, torch.Tensor]
) -> Callable[..., Any]:
    """A hook that divides a linear's input by `columns` and rounds it to `grid`; None leaves it as it is."""
    static = None
    if grid is not None and not grid.dynamic:
        low, high = range_[0] / columns, range_[1] / columns
        static = input_scale(low.amin(0, keepdim=True), high.amax(0, keepdim=True), grid)

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        x = args[0] / columns
        return (x if grid is None else round_inputs(x, grid, static),)

    return hook
