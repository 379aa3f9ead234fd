"""Grids of weights: from the range of a group to its scale and zero point, and from weights to the nearest values.

Symmetric integers ("7.5" convention of GPTQ and compressed-tensors): s = 2 max|w| / (2^b - 1), z = 2^(b-1).
Asymmetric integers, zero included: s = (max(hi, 0) - min(lo, 0)) / (2^b - 1), z = round(-lo / s).
Floats and tables: s = max|w| / the format's largest value; as a power of two (MX formats): the exponent of max|w| less
that of the largest value, one more where the mantissa of max|w| is at least 1.75 (as compressed-tensors has it).
The scale is rounded to what is stored *before* any code is computed from it. Here a scale is what levels are multiplied
by: of NVFP4 an FP8 number divided by the tensor's global scale.
"""

from __future__ import annotations

import math

import torch
from quantkit_kernels.cpu import library, rounding

from quantkit.numerics.number import bounds, encode, largest, nearest, rising_levels
from quantkit.scheme import Grid

_SCALES = {"e8m0": torch.float8_e8m0fnu, "fp8_e4m3": torch.float8_e4m3fn}
_LARGEST_FP8 = 448.0
_BIAS = 127  # of E8M0 and of fp32


def scale_dtype(grid: Grid, dtype: torch.dtype) -> torch.dtype:
    """What the scales of a grid are stored as in a model of type `dtype`."""
    return dtype if grid.scale is None else _SCALES[grid.scale]


def abs_max_global(span: torch.Tensor, grid: Grid) -> torch.Tensor | None:
    """The global scale, fp32 [1], with which the largest of the ranges max|w| has the largest FP8 scale.

    None for a grid without one. 1 if all ranges are empty.
    """
    if not grid.two_level:
        return None
    most = span.max().float()
    found = torch.where(most > 0, _LARGEST_FP8 * largest(grid.number) / most, torch.ones_like(most))
    return found.clamp(max=torch.finfo(torch.float32).max).reshape(1)


def scale_and_zero(
    lo: torch.Tensor,
    hi: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    global_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (rounded to what is stored, returned as fp32 or fp64) and zero point (as a float) for ranges of any shape.

    dtype: the model's. global_scale: of a two-level grid; None: that of the largest of these ranges.
    An empty range (lo = hi = 0) gets scale 1 (or the largest below it), so that zero is represented exactly.
    """
    if grid.scale is not None:
        return _short_scale(torch.maximum(lo.abs(), hi.abs()), grid, global_scale)
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


def _short_scale(
    span: torch.Tensor, grid: Grid, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale_and_zero` for ranges max|w|, on a symmetric grid whose scales are one byte each."""
    most = grid.qmax / 2 if grid.number.kind == "int" else largest(grid.number)
    if grid.scale == "e8m0":
        mantissa, exponent = torch.frexp(span)  # the mantissa in [0.5, 1)
        exponent = exponent - math.frexp(most)[1] + (mantissa >= 0.875).int()
        scale = torch.where(span > 0, _power_of_two(exponent).to(span.dtype), torch.ones_like(span))
    else:
        global_scale = abs_max_global(span, grid) if global_scale is None else global_scale
        scale = torch.where(span > 0, span / most, torch.ones_like(span))
        scale = as_stored_for(grid, scale, torch.float32, global_scale)
    return scale, torch.full_like(scale, grid.midpoint)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in fp32, within what E8M0 and normal fp32 numbers have."""
    return (exponent + _BIAS).clamp(1, 2 * _BIAS).to(torch.uint8).view(torch.float8_e8m0fnu).float()


def as_stored_for(
    grid: Grid, scale: torch.Tensor, dtype: torch.dtype, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """`scale` > 0 rounded to the nearest that a grid stores in a model of type `dtype`, in its own type."""
    if grid.scale is None:
        return as_stored(scale, dtype)
    if grid.scale == "e8m0":
        mantissa, exponent = torch.frexp(scale)
        return _power_of_two(exponent - 1 + (mantissa > 0.75).int()).to(scale.dtype)
    assert global_scale is not None
    least = torch.finfo(torch.float8_e4m3fn).tiny * torch.finfo(torch.float8_e4m3fn).eps
    short = (scale * global_scale).clamp(least, _LARGEST_FP8).to(torch.float8_e4m3fn)
    return short.to(scale.dtype) / global_scale.to(scale.dtype)


def to_stored(
    grid: Grid, scale: torch.Tensor, dtype: torch.dtype, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """The tensor that is stored for scales that a grid stores (`as_stored_for`)."""
    if grid.two_level:
        assert global_scale is not None
        return (scale * global_scale.to(scale.dtype)).to(torch.float8_e4m3fn)
    return scale.float().to(_SCALES["e8m0"]) if grid.scale == "e8m0" else scale.to(dtype)


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


def to_codes(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The codes, uint8 [N, K], of the levels nearest to w [N, K], with scale and zero [N, K/G]; w fp32 or fp64.

    In native code where there is some; it gives the same.
    """
    if w.is_cpu and w.dtype == torch.float32 and w.numel() and library.available():
        w, scale, number = w.contiguous(), scale.contiguous(), grid.number
        if number.kind == "int":
            return rounding.encode_integers(w, scale, zero.contiguous(), grid.qmax)
        if number.name == "fp8_e4m3":
            return rounding.encode_fp8(w, scale)
        table = rising_levels(number, w.dtype, w.device)
        if len(table.codes) <= rounding.LEVELS:
            return rounding.encode_table(w, scale, table.edges, table.codes)
    groups = grouped(w, grid.group(w.shape[1]))
    return encode(groups / scale[:, :, None], grid.number, zero[:, :, None]).view(w.shape)


def grouped(w: torch.Tensor, group: int) -> torch.Tensor:
    """[N, K] seen as (N, K/G, G)."""
    return w.view(w.shape[0], -1, group)


def over_rows(sums: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Sums [N, K/G] of rows added up over the rows that share a scale; every row has the total."""
    rows = grid.rows(len(sums))
    if rows == 1:
        return sums
    return torch.cat([part.sum(0, keepdim=True).expand(len(part), -1) for part in sums.split(rows)])
