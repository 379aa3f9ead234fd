"""SmoothQuant (Xiao et al., arXiv 2211.10438): the range of large input channels moves into the weights.

For linears fed by one x, channel j of x is divided by s_j and column j of their weights multiplied by it, with
s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) (equation 4). Inputs rounded to 8 bits lose little then, and weights, which
have no such channels, can bear the rest. A transform: it returns ordinary weights, any algorithm may quantize them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from quantkit.numerics.statistics import dead_note
from quantkit.transforms.config import SmoothQuantConfig
from quantkit.transforms.groups import by_channel, left_out, planned
from quantkit.transforms.registry import EVERY, register

if TYPE_CHECKING:
    from quantkit.calibration.block_run import BlockRun
    from quantkit.structure.fold import ScalingGroup

INSTEAD = "leave out the smoothquant transform"
FLOOR = 1e-5  # of the largest weight of a channel, as in the authors' code
LIMITS = (1e-4, 1e4)  # of s: what a norm in float16 can still hold


def scales(input_max: torch.Tensor, weight_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """s [channels] from max|x| and max|w| of each channel; 1 for a channel that is always 0 or that no weight reads."""
    s = input_max.pow(alpha) / weight_max.clamp(min=FLOOR).pow(1 - alpha)
    return torch.where((input_max > 0) & (weight_max > 0), s.clamp(*LIMITS), 1.0)


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
    alpha = config.strength(run.model_type)
    report = [_smooth(run, g, input_max[g.consumers[0]], alpha) for g in reversed(groups)][::-1]
    others = left_out(run.trace.siblings, proved, refused, run.plans)
    return report + [{"alpha": None} | entry for entry in others]


def _smooth(run: BlockRun, group: ScalingGroup, input_max: torch.Tensor, alpha: float) -> dict[str, Any]:
    """Fold the scales of one group. input_max: [K], max|x| of every column of its consumers."""
    weights = [run.held[n].weight.abs().amax(0) for n in group.consumers]
    weight_max = by_channel(torch.stack(weights).amax(0), group.expand, "amax")
    channels = by_channel(input_max, group.expand, "amax")
    s = scales(channels, weight_max, alpha)
    report = {
        "producer": group.producer,
        "consumers": list(group.consumers),
        "alpha": alpha,
        "input_max": float(channels.amax()),
        "smoothed_max": float((channels / s).amax()),
    }
    if note := dead_note(int((channels == 0).sum()), len(channels), "not smoothed"):
        report["note"] = note
    return report | {"output_change": run.fold(group, s, INSTEAD)}
