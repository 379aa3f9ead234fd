"""Where a grid should end: the plain range of a group, or the shrunken one with the least rounding error.

`mse`: for p in 1, 0.98, ... the range (p lo, p hi) with the least sum |w - w_hat|^2.5;
`weighted`: the same with each column's error weighted by E[x^2] (llama.cpp's imatrix, llm-compressor's imatrix_mse).
"""

from __future__ import annotations

import torch

from quantkit.numerics.grid import grouped, levels, round_to_grid, scale_and_zero, smallest_scale
from quantkit.numerics.number import bounds, nearest
from quantkit.scheme import Grid

STRIDE = 0.02
STEPS = {2: 35, 3: 28, 4: 20}  # shrink factors tried, STRIDE apart: fewer bits clip deeper
STEPS_WIDE = 12
_CHUNK = 1 << 17  # elements per pass, so that the temporaries stay in the second-level cache
_WORTH_GATHERING = 0.6  # share of the groups up to which copying them out costs less than trying all
_SURE = 0.99  # a lower bound of an error is taken this much lower, for rounding


def search_grid(
    weight: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    method: str = "minmax",
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of every group of `weight` [N, K]: two float tensors [N, K/G].

    dtype: the stored dtype of the scale. method: minmax | mse | weighted; `weighted` needs importance [K] >= 0.
    """
    group = grid.group(weight.shape[1])
    if method == "minmax":
        w = grouped(weight, group)
        return scale_and_zero(w.amin(2), w.amax(2), grid, dtype)
    if method == "weighted":
        if importance is None:
            raise ValueError("range search 'weighted' needs the mean square of the inputs")
        column = importance.to(weight.dtype).view(-1, group)
    else:
        column = None
    n, k = weight.shape
    parts = []
    for chunk in torch.split(weight, max(1, _CHUNK // k)):
        weights = None if column is None else column.repeat(len(chunk), 1)
        parts.append(_search(chunk.reshape(-1, group), grid, dtype, weights))
    scale, zero = (torch.cat([part[i] for part in parts]).view(n, k // group) for i in (0, 1))
    return scale, zero


def _search(
    w: torch.Tensor, grid: Grid, dtype: torch.dtype, column: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero (groups) for w (groups, G); column: as w, see `_error`.

    A shrunken range is tried only for groups where it can win: their largest weight alone, cut to the end of the range,
    must not cost more than the best range so far does. The result is that of trying all.
    """
    lo, hi = w.amin(1), w.amax(1)
    best_scale, best_zero = scale_and_zero(lo, hi, grid, dtype)
    ends = nearest(grid.number)
    least = _error(w, best_scale, best_zero, grid, column)
    for step in range(1, STEPS.get(grid.bits, STEPS_WIDE)):
        shrink = 1 - step * STRIDE
        scale, zero = scale_and_zero(lo * shrink, hi * shrink, grid, dtype)
        active = None
        if column is None:
            limits = bounds(zero, grid.number)
            cut = torch.maximum(
                hi - ends(hi / scale, *limits) * scale, ends(lo / scale, *limits) * scale - lo
            )
            active = (cut.clamp_(min=0).pow_(2.5) * _SURE < least).nonzero().squeeze(1)
            if not len(active):
                continue
            if len(active) > _WORTH_GATHERING * len(w):
                active = None
        if active is None:
            error = _error(w, scale, zero, grid, column)
        else:
            error = torch.full_like(least, torch.inf)
            error[active] = _error(w[active], scale[active], zero[active], grid, column)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _error(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid, column: torch.Tensor | None
) -> torch.Tensor:
    """Error of every group of w (groups, G): |.|^2.5, or squared and weighted by `column` (groups, G) if given.

    In units of the step, off = level - w/s: half the passes of dequantizing. GPTQ's power 2.4 is as good and needs
    `pow`, 2 clips too deep (docs/LOG.md).
    """
    steps = w / scale[:, None]
    off = nearest(grid.number)(steps, *bounds(zero[:, None], grid.number), torch.empty_like(steps)).sub_(
        steps
    )
    if column is not None:
        squares: torch.Tensor = torch.linalg.vecdot(off, off * column)
        return squares * scale.square()
    powers: torch.Tensor = torch.linalg.vecdot(torch.mul(off, off, out=steps), off.abs_().sqrt_())
    return powers * scale.pow(2.5)


def refit_scale(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    rounds: int,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Alternate rounding and the closed-form scale s* = sum v w (q - z) / sum v (q - z)^2.

    A refit is kept for a group only where it lowers that group's error, so the result is never worse.
    Returns the scale [N, K/G], already rounded to `dtype`.
    """
    group = grid.group(weight.shape[1])
    w = grouped(weight, group)
    v = torch.ones(1) if importance is None else importance.to(w.dtype).view(1, -1, group)

    def error(s: torch.Tensor) -> torch.Tensor:
        off = round_to_grid(w, s[:, :, None], zero[:, :, None], grid) - w
        return (off.square_() * v).sum(2)

    least = error(scale)
    for _ in range(rounds):
        q = levels(w, scale[:, :, None], zero[:, :, None], grid)
        norm = (v * q * q).sum(2)
        fitted = torch.where(norm > 0, (v * w * q).sum(2) / norm.clamp(min=1e-30), scale)
        fitted = torch.where(fitted >= smallest_scale(dtype), fitted.to(dtype).to(w.dtype), scale)
        now = error(fitted)
        better = now < least
        if not bool(better.any()):
            break
        scale, least = torch.where(better, fitted, scale), torch.where(better, now, least)
    return scale
