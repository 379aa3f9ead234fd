"""Equation 4 of SmoothQuant (arXiv 2211.10438), which SmoothQuant and SmoothQuant+ share.

For linears fed by one x, channel j of x is divided by s_j and column j of their weights multiplied by it, with
s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), the maximum of the weights over all consumers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantkit.transforms.groups import by_channel

if TYPE_CHECKING:
    from quantkit.calibration.block_run import BlockRun
    from quantkit.structure.fold import ScalingGroup

FLOOR = 1e-5  # of the largest weight of a channel, as in SmoothQuant's code
LIMITS = (1e-4, 1e4)  # of s: what a norm in float16 can still hold


def scales(input_max: torch.Tensor, weight_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """s [channels] from max|x| and max|w| of each channel; 1 for a channel that is always 0 or that no weight reads."""
    s = input_max.pow(alpha) / weight_max.clamp(min=FLOOR).pow(1 - alpha)
    return torch.where((input_max > 0) & (weight_max > 0), s.clamp(*LIMITS), 1.0)


def channel_maxima(
    run: BlockRun, group: ScalingGroup, input_max: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(max|x|, max|w|) [channels] of a group. input_max: [K], max|x| of every column of its consumers.

    The weights count as they are now: later groups of a block are to be folded first, as the fold of a group divides
    rows of its producer, which is a consumer of an earlier group.
    """
    weights = torch.stack([run.held[n].weight.abs().amax(0) for n in group.consumers]).amax(0)
    channels, weight_max = (by_channel(t, group.expand, "amax") for t in (input_max, weights))
    return channels, weight_max
