"""What transforms that scale channels share: which groups they may touch, and what they report of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from quantkit.numerics.grid import grouped, round_to_grid
from quantkit.numerics.range_search import search_grid
from quantkit.scheme import Grid

if TYPE_CHECKING:
    from quantkit.plan import LayerPlan
    from quantkit.structure.fold import ScalingGroup


def rounded(weight: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """`weight` [N, K] on the plain min-max grid of `grid`."""
    scale, zero = search_grid(weight, grid, dtype)
    w = grouped(weight, grid.group(weight.shape[1]))
    return round_to_grid(w, scale[:, :, None], zero[:, :, None], grid).view(weight.shape)


def planned(group: ScalingGroup, plans: dict[str, LayerPlan]) -> bool:
    """Whether all a fold would change is quantized here, or is a norm."""
    return all(n in plans for n in group.consumers) and (group.form != "rows" or group.producer in plans)


def left_out(
    sets: tuple[tuple[str, ...], ...],
    proved: list[ScalingGroup],
    refused: list[tuple[str, str]],
    plans: dict[str, LayerPlan],
) -> list[dict[str, Any]]:
    """One entry for every set of planned siblings that no group scales, with the reason."""
    entries = []
    for siblings in sets:
        group = next((g for g in proved if set(g.consumers) == set(siblings)), None)
        if not any(n in plans for n in siblings) or (group and planned(group, plans)):
            continue
        if group:
            changes = (*siblings, group.producer) if group.form == "rows" else siblings
            others = [n for n in changes if n not in plans]
            why = f"{', '.join(others)} would change too and the recipe leaves it as it is"
        else:
            tried = [f"{pair}: {why}" for pair, why in refused if pair.endswith(f"-> {', '.join(siblings)}")]
            why = "; ".join(tried) or "nothing before it can take the inverse scale"
        entries.append({"producer": None, "consumers": list(siblings), "left_out": why})
    return entries


def by_channel(
    values: torch.Tensor, expand: torch.Tensor | None, reduce: Literal["mean", "amax"]
) -> torch.Tensor:
    """One value per channel from those of the columns that share it, [K] -> [channels]; expand as in `ScalingGroup`."""
    if expand is None:
        return values
    expand = expand.to(values.device)
    channels = values.new_zeros(int(expand.max()) + 1)
    return channels.scatter_reduce_(0, expand, values, reduce, include_self=False)
