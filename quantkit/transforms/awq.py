"""AWQ (Lin et al. 2023): input channels that carry large activations are scaled up before rounding.

For linears fed by one x, W diag(s) is quantized and x / s is what they get; s = mean|x|^r, r searched on the output
error of the module that holds them. A transform: it returns ordinary weights, any algorithm may quantize them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from quantkit.numerics.grid import grouped, round_to_grid, scale_and_zero
from quantkit.numerics.range_search import search_global
from quantkit.numerics.statistics import dead_note, neutral
from quantkit.scheme import Grid
from quantkit.transforms.config import AwqConfig
from quantkit.transforms.groups import by_channel, left_out, planned, rounded
from quantkit.transforms.registry import register

if TYPE_CHECKING:
    from quantkit.calibration.block_run import BlockRun
    from quantkit.structure.fold import ScalingGroup

INSTEAD = "leave out the awq transform"
CLIP_STEPS = 10  # ranges 1.00, 0.95, ... 0.55 of the largest weight


@dataclass(frozen=True)
class ScaleSearch:
    """The scale found, [K]; the exponent (None = identity), and the loss with it and without scaling."""

    scale: torch.Tensor
    exponent: float | None
    loss: float
    identity_loss: float


def candidate(mean_abs: torch.Tensor, exponent: float) -> torch.Tensor:
    """s = mean|x|^r, floored at 1e-4 and centred so that sqrt(max s * min s) = 1; dead channels get 1.

    The centre is that of the channels that fire: dead ones would pull it so far down that their own columns, with 1,
    would be rounded away beside columns that are scaled up.
    """
    fires = mean_abs > 0
    s = mean_abs.pow(exponent).clamp(min=1e-4)
    if not bool(fires.any()):
        return torch.ones_like(s)
    s = s / (s[fires].max() * s[fires].min()).sqrt()
    return torch.where(fires & torch.isfinite(s), s, torch.ones_like(s))


def in_turn(work: list[Callable[[], float]]) -> list[float]:
    """Call some functions, one after the other."""
    return [each() for each in work]


def search_scale(
    mean_abs: torch.Tensor,
    expand: torch.Tensor | None,
    weights: list[torch.Tensor],
    grids: list[Grid],
    dtype: torch.dtype,
    loss: Callable[[list[torch.Tensor]], float],
    grid: int,
    share: Callable[[list[Callable[[], float]]], list[float]] = in_turn,
) -> ScaleSearch:
    """Search s for the consumers `weights` ([N, K] each).

    mean_abs: [channels]. expand: [K], the channel of each column (grouped value heads), None for one to one.
    loss: output error of the inspected module with these weights in place of the original ones. share: computes them
    for all candidates.
    The identity is always a candidate, so the result is never worse on this loss.
    """

    def attempt(s: torch.Tensor) -> float:
        columns = s if expand is None else s[expand]
        return loss([rounded(w * columns, g, dtype) / columns for w, g in zip(weights, grids, strict=True)])

    exponents = [step / grid for step in range(1, grid)]
    scales = [torch.ones_like(mean_abs), *(candidate(mean_abs, exponent) for exponent in exponents)]
    identity_loss, *losses = share([partial(attempt, s) for s in scales])
    best = ScaleSearch(scales[0], None, identity_loss, identity_loss)
    for exponent, s, value in zip(exponents, scales[1:], losses, strict=True):
        if value < best.loss:
            best = ScaleSearch(s, exponent, value, identity_loss)
    return best


def clip(weight: torch.Tensor, sample: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """Clamp each (row, group) of `weight` [N, K] to the range with the least error of its partial sum over `sample`.

    sample: inputs [tokens, K]. The error of a group is delta (X_g^T X_g) delta^T; no clipping is a candidate.
    Rows that share a scale stay as they are: clamped each for itself, none would get the scale it is tried with.
    """
    if grid.rows(weight.shape[0]) > 1:
        return weight
    global_scale = search_global(weight, grid)
    group = grid.group(weight.shape[1])
    x = sample.view(sample.shape[0], -1, group).transpose(0, 1)  # (K/G, tokens, G)
    gram = _with_signal(x.transpose(1, 2) @ x)  # (K/G, G, G)
    w = grouped(weight, group)
    limit = w.abs().amax(2)  # (N, K/G)
    best, least = limit.clone(), torch.full_like(limit, torch.inf)
    for step in range(CLIP_STEPS):
        bound = limit * (1 - step / 20)
        clamped = w.clamp(-bound[:, :, None], bound[:, :, None])
        scale, zero = scale_and_zero(clamped.amin(2), clamped.amax(2), grid, dtype, global_scale)
        off = (round_to_grid(clamped, scale[:, :, None], zero[:, :, None], grid) - w).transpose(0, 1)
        error = ((off @ gram) * off).sum(2).T  # (N, K/G)
        better = error < least
        best, least = torch.where(better, bound, best), torch.where(better, error, least)
    return w.clamp(-best[:, :, None], best[:, :, None]).reshape(weight.shape)


def _with_signal(gram: torch.Tensor) -> torch.Tensor:
    """X^T X [..., K, K], in place: a column without a signal counts as an average one, for which no error is free."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    if bool((diagonal == 0).any()):
        diagonal.copy_(neutral(diagonal))
    return gram


# on one block ----------------------------------------------------------------------------------------------------


@register("awq", windows=lambda config: config.windows)
@torch.no_grad()
def apply(run: BlockRun, config: AwqConfig) -> list[dict[str, Any]]:
    """Scale, then clip, the planned linears of one block. One report per scaling group that was looked at."""
    report: list[dict[str, Any]] = []
    for held in run.held.values():
        held.weight.data = held.weight.data.float()
    if config.scale:
        proved, refused = run.scaling_groups(INSTEAD)
        groups = [g for g in proved if planned(g, run.plans)]
        names = {n for g in groups for n in (g.inspect, g.consumers[0])}
        # one pass serves all groups: a group's own fold is all that changes its consumers' input
        seen = run.observe(names, config.windows)
        report += [_scale(run, g, seen, config) for g in groups]
        del seen
        others = left_out(run.trace.siblings, proved, refused, run.plans)
        report += [{"exponent": None} | entry for entry in others]
    rounds_only = all(p.algorithm.name == "rtn" for p in run.plans.values())
    if config.clip is True or (config.clip == "auto" and rounds_only):
        _clip(run, config)
    return report


def _scale(
    run: BlockRun, group: ScalingGroup, seen: dict[str, list[Any]], config: AwqConfig
) -> dict[str, Any]:
    """Search the scales of one group and fold them in, if they are better than none."""
    held = [run.held[n] for n in group.consumers]
    inputs = [args[0] for args, _, _ in seen[group.consumers[0]]]
    mean_abs = by_channel(run.gather("mean_abs", inputs), group.expand, "mean")
    loss = _output_error(run, group, seen)
    linear = group.inspect == group.consumers[0]
    run.select(full=True)
    found = search_scale(
        mean_abs,
        group.expand,
        [m.weight for m in held],
        [run.plans[n].scheme.weights for n in group.consumers],
        run.stored[f"{group.consumers[0]}.weight"],
        loss,
        config.grid,
        run.ranks.share if linear else in_turn,  # every process has some windows of the outputs of a module
    )
    report = {
        "producer": group.producer,
        "consumers": list(group.consumers),
        "exponent": found.exponent,
        "loss": found.loss,
        "identity_loss": found.identity_loss,
    }
    if note := dead_note(int((mean_abs == 0).sum()), len(mean_abs), "not scaled"):
        report["note"] = note
    if found.exponent is None:
        return report
    return report | {"output_change": run.fold(group, found.scale, INSTEAD)}


def _clip(run: BlockRun, config: AwqConfig) -> None:
    """Clip every planned linear but those whose error is seen through attention logits."""
    plans = {n: p for n, p in run.plans.items() if not run.feeds_attention_logits(n)}
    seen = run.observe(plans, config.windows)
    for name, plan in plans.items():
        sample = run.sample([args[0] for args, _, _ in seen[name]])
        if sample is None:  # no text reaches it
            continue
        module = run.held[name]
        module.weight.data = clip(
            module.weight.data, sample, plan.scheme.weights, run.stored[f"{name}.weight"]
        )


def _output_error(
    run: BlockRun, group: ScalingGroup, seen: dict[str, list[Any]]
) -> Callable[[list[torch.Tensor]], float]:
    """Mean squared error of the inspected module's output as a function of the consumers' weights.

    Over the windows of all processes. A single linear needs no forward: its output error is tr(E H E^T).
    """
    held = [run.held[n] for n in group.consumers]
    if group.inspect == group.consumers[0]:
        hessian = _with_signal(run.gather("hessian", [args[0] for args, _, _ in seen[group.inspect]]))

        def of_linear(weights: list[torch.Tensor]) -> float:
            off = weights[0] - held[0].weight
            return float(((off @ hessian) * off).sum())

        return of_linear
    calls = seen[group.inspect]
    inspected = run.module.get_submodule(group.inspect) if group.inspect else run.module

    def of_module(weights: list[torch.Tensor]) -> float:
        for module, weight in zip(held, weights, strict=True):
            module.override = weight
        total, count = 0.0, 0.0
        for args, kwargs, wanted in calls:
            out = run.output(inspected, args, kwargs)
            total += float((out - wanted).square().sum())
            count += wanted.numel()
        for module in held:
            module.override = None
        total, count = run.ranks.totals(total, count)
        return total / count

    return of_module
