"""SmoothQuant+ (Pan et al., arXiv 2312.03788): SmoothQuant for weight-only rounding, one strength for all blocks.

SmoothQuant moves the range of large input channels into the weights. Here the inputs are not rounded, and the aim is
another one: large channels make the error of their columns expensive, and after smoothing those columns are larger
beside the others of their group. The strength is alpha of equation 4, the same for every group of the model. The
authors choose it by the loss of the whole model with all its weights rounded; their code was not published, and this
follows their description: strengths 0, 0.05, ... 1 and the model as it is, compared by the mean KL of the logits to the
original's (`quantkit.pipeline.search`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from quantkit.numerics.statistics import dead_note
from quantkit.transforms.config import SmoothQuantPlusConfig
from quantkit.transforms.equalize import channel_maxima, scales
from quantkit.transforms.groups import left_out, planned
from quantkit.transforms.registry import EVERY, Search, Strength, register

if TYPE_CHECKING:
    from quantkit.calibration.block_run import BlockRun
    from quantkit.structure.fold import ScalingGroup

INSTEAD = "leave out the smoothquant_plus transform"
STEPS = 20  # from strength 0 to 1
COARSE, FINE = 5, 2  # steps between coarse strengths, and around the best of them


def following(config: SmoothQuantPlusConfig, losses: Mapping[Strength, float]) -> list[Strength]:
    """The strengths to try next, at most `config.beside`."""
    coarse = [step / STEPS for step in range(0, STEPS + 1, 1 if config.search == "full" else COARSE)]
    wanted: list[Strength] = [None, *coarse]
    if config.search == "coarse" and losses.keys() >= set(wanted):
        centre = round(STEPS * min(coarse, key=lambda each: losses[each]))
        wanted += [step / STEPS for step in range(max(0, centre - FINE), min(STEPS, centre + FINE) + 1)]
    return [each for each in wanted if each not in losses][: config.beside]


def rounds(config: SmoothQuantPlusConfig) -> list[int]:
    """How many strengths each walk is expected to try."""
    if config.strength != "search":
        return []
    parts = [STEPS + 2] if config.search == "full" else [STEPS // COARSE + 2, 2 * FINE]
    return [min(config.beside, part - a) for part in parts for a in range(0, part, config.beside)]


def settled(config: SmoothQuantPlusConfig, strength: Strength) -> SmoothQuantPlusConfig:
    """The config with the strength that was found."""
    return config.model_copy(update={"strength": "none" if strength is None else strength})


def groups_of(run: BlockRun) -> list[ScalingGroup]:
    """The groups of a block that may be changed."""
    return [g for g in run.scaling_groups(INSTEAD)[0] if planned(g, run.plans)]


@torch.no_grad()
def try_on(
    run: BlockRun, strength: Strength, input_max: Mapping[tuple[str, ...], torch.Tensor]
) -> Mapping[tuple[str, ...], torch.Tensor]:
    """Smooth one block for a trial; the largest inputs behind it. The walk that follows proves what is kept."""
    smoothed = dict(input_max)
    if strength is not None:
        for group in reversed(groups_of(run)):
            channels, weight_max = channel_maxima(run, group, input_max[group.consumers])
            s = scales(channels, weight_max, strength)
            run.fold_on_trial(group, s)
            smoothed[group.consumers] = channels / s
    return smoothed


@register(
    "smoothquant_plus",
    windows=lambda config: config.windows or EVERY,
    search=Search(following, groups_of, try_on, settled, rounds),
)
@torch.no_grad()
def apply(run: BlockRun, config: SmoothQuantPlusConfig) -> list[dict[str, Any]]:
    """Smooth the inputs of the planned linears of one block. One report per scaling group that was looked at."""
    if config.strength == "search":
        raise ValueError("the strength has not been searched yet")
    if config.strength == "none":
        return []
    for held in run.held.values():
        held.weight.data = held.weight.data.float()
    groups = groups_of(run)
    input_max = run.inputs_of([g.consumers[0] for g in groups], "amax", None)
    report = [_smooth(run, g, input_max[g.consumers[0]], config.strength) for g in reversed(groups)][::-1]
    return report + left_out(run.trace.siblings, *run.scaling_groups(INSTEAD), run.plans)


def _smooth(run: BlockRun, group: ScalingGroup, input_max: torch.Tensor, strength: float) -> dict[str, Any]:
    """Fold the scales of one group. input_max: [K], max|x| of every column of its consumers."""
    channels, weight_max = channel_maxima(run, group, input_max)
    s = scales(channels, weight_max, strength)
    report = {
        "producer": group.producer,
        "consumers": list(group.consumers),
        "strength": strength,
        "input_max": float(channels.amax()),
        "smoothed_max": float((channels / s).amax()),
    }
    if note := dead_note(int((channels == 0).sum()), len(channels), "not smoothed"):
        report["note"] = note
    return report | {"output_change": run.fold(group, s, INSTEAD)}
