"""Round to nearest: no data needed, the baseline and the oracle of every other method's degenerate case."""

from __future__ import annotations

import torch

from quantkit.algorithms.config import RtnConfig
from quantkit.algorithms.registry import Outcome, register
from quantkit.numerics.grid import to_codes, to_stored
from quantkit.numerics.range_search import search_global, search_grid
from quantkit.numerics.refit import refit_scale
from quantkit.numerics.statistics import Statistics, dead_note
from quantkit.numerics.weight import QuantizedWeight, row_chunks
from quantkit.scheme import Grid


def on_grid(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    global_scale: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Round `weight` [N, K] to the grids (scale, zero) [N, K/G] of a model of type `dtype`."""
    out = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(*weight.shape):
        out[rows] = to_codes(weight[rows], scale[rows], zero[rows], grid)
    return QuantizedWeight(
        codes=out,
        scale=to_stored(grid, scale, dtype, global_scale),
        zero=None if grid.symmetric else zero.to(torch.uint8),
        grid=grid,
        global_scale=global_scale,
    )


def rtn(
    weight: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    method: str = "minmax",
    refit: int = 0,
    importance: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize `weight` [N, K]; `dtype` is the model's, importance the mean square input [K].

    global_scale: of a two-level grid, if the weight is only some rows of one; None: it is searched.
    """
    if global_scale is None:
        global_scale = search_global(weight, grid, method, importance)
    scale, zero = search_grid(weight, grid, dtype, method, importance, global_scale)
    if refit:
        scale = refit_scale(weight, scale, zero, grid, dtype, refit, importance, global_scale)
    return on_grid(weight, scale, zero, grid, dtype, global_scale)


@register("rtn", lambda config: config.needs)
def quantize(
    weight: torch.Tensor, statistics: Statistics, grid: Grid, dtype: torch.dtype, config: RtnConfig
) -> Outcome:
    importance = statistics.mean_square
    quantized = rtn(weight, grid, dtype, config.range, config.refit, importance)
    dead = 0 if importance is None else int((importance == 0).sum())
    note = dead_note(dead, weight.shape[1], "count as columns of mean importance in the range search")
    return Outcome(quantized, fallbacks=[note] if note else [])
