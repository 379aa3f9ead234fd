"""Grids of weights: from the range of a group to its scale and zero point, and from weights to the nearest values.

Symmetric integers ("7.5" convention of GPTQ and compressed-tensors): s = 2 max|w| / (2^b - 1), z = 2^(b-1).
Asymmetric integers, zero included: s = (max(hi, 0) - min(lo, 0)) / (2^b - 1), z = round(-lo / s).
Floats and tables: s = max|w| / the format's largest value.
The scale is rounded to its stored dtype *before* any code is computed from it.
"""

from __future__ import annotations

import torch

from quantkit.numerics.number import bounds, largest, nearest
from quantkit.scheme import Grid


def scale_and_zero(
    lo: torch.Tensor, hi: torch.Tensor, grid: Grid, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (rounded to `dtype`, returned as fp32 or fp64) and zero point (as a float) for ranges of any shape.

    An empty range (lo = hi = 0) gets scale 1, so that zero is represented exactly.
    """
    steps: float = grid.qmax
    if grid.number.kind != "int":
        span, steps = torch.maximum(lo.abs(), hi.abs()), largest(grid.number)
    elif grid.symmetric:
        span = torch.maximum(lo.abs(), hi.abs()) * 2
    else:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        span = hi - lo
    scale = torch.where(span > 0, span / steps, torch.ones_like(span))
    scale = as_stored(scale, dtype)
    if grid.symmetric:
        return scale, torch.full_like(scale, grid.midpoint)
    return scale, (-lo / scale).round_().clamp_(0, grid.qmax)


def smallest_scale(dtype: torch.dtype) -> float:
    """The smallest scale that is stored as `dtype`: fp16's smallest subnormal, the smallest normal of wider exponents.

    fp16 weights have subnormals, so their scales need them; every kernel widens fp16 exactly. Processors may flush the
    subnormals of bf16 and fp32, and no weight is that small.
    """
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


def as_stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` rounded to what `dtype` stores, in its own type; fp16's subnormals are rounded up.

    They are so coarse that rounding down could cut a group's largest weight to two thirds.
    """
    least = smallest_scale(dtype)
    if dtype == torch.float16:
        scale = torch.where(scale < torch.finfo(dtype).tiny, (scale / least).ceil_().mul_(least), scale)
    return scale.clamp(min=least).to(dtype).to(scale.dtype)


def round_to_grid(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The value on the grid nearest to `w`; scale and zero broadcast to it."""
    return levels(w, scale, zero, grid).mul_(scale)


def levels(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """`round_to_grid` in units of the scale."""
    return nearest(grid.number)(w / scale, *bounds(zero, grid.number))


def grouped(w: torch.Tensor, group: int) -> torch.Tensor:
    """[N, K] seen as (N, K/G, G)."""
    return w.view(w.shape[0], -1, group)
