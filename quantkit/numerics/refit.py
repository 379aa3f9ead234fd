"""Scales fitted to the codes: with the codes fixed, the scale with the least error has a closed form."""

from __future__ import annotations

import torch

from quantkit.numerics.grid import as_stored_for, grouped, levels, over_rows, round_to_grid, smallest_scale
from quantkit.numerics.statistics import neutral
from quantkit.scheme import Grid


def refit_scale(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    rounds: int,
    importance: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Alternate rounding and the closed-form scale s* = sum v w (q - z) / sum v (q - z)^2.

    A refit is kept for a group only where it lowers that group's error, so the result is never worse.
    Returns the scale [N, K/G], already rounded to what is stored in a model of type `dtype`.
    """
    group = grid.group(weight.shape[1])
    w = grouped(weight, group)
    v = torch.ones(1) if importance is None else neutral(importance.to(w.dtype)).view(1, -1, group)

    def error(s: torch.Tensor) -> torch.Tensor:
        off = round_to_grid(w, s[:, :, None], zero[:, :, None], grid) - w
        return over_rows((off.square_() * v).sum(2), grid)

    least = error(scale)
    for _ in range(rounds):
        q = levels(w, scale[:, :, None], zero[:, :, None], grid)
        norm = over_rows((v * q * q).sum(2), grid)
        fitted = torch.where(norm > 0, over_rows((v * w * q).sum(2), grid) / norm.clamp(min=1e-30), scale)
        if grid.scale is None:
            fitted = torch.where(fitted >= smallest_scale(dtype), fitted.to(dtype).to(w.dtype), scale)
        else:
            fitted = torch.where(fitted > 0, as_stored_for(grid, fitted, dtype, global_scale), scale)
        now = error(fitted)
        better = now < least
        if not bool(better.any()):
            break
        scale, least = torch.where(better, fitted, scale), torch.where(better, now, least)
    return scale
