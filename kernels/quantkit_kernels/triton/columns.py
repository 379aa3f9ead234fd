"""GPTQ's loops over the columns of a block as one kernel launch, for E weights of equal shape.

A program keeps [B, strip] of one transposed weight in the registers of one warp and steps through its B rows. A step
reads its row by a masked sum, rounds it, and subtracts the outer product from the rows after it. Divisions follow IEEE
754; products and sums may be fused, so the last bits of errors may differ from torch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROUND = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: adding and subtracting it rounds to an integer, halves to even
_ENTRIES = 2048  # of a program's tile: 64 registers per thread and tile
LARGEST = 256


@triton.jit
def spread_kernel(
    weight, upper, scale, low, high, groups, levels, errors, b, n,
    w_e, w_b, u_e, u_b, u_r, s_e, s_g, lo_e, lo_g, hi_e, hi_g, g_e, g_b, l_e, l_b, r_e, r_b,
    BLOCK: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """See `spread`; x_e, x_b: strides of experts and rows."""
    e = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * STRIP + tl.arange(0, STRIP)
    rows = tl.arange(0, BLOCK)
    inside = columns < n
    mask = (rows < b)[:, None] & inside[None, :]
    tile_at = weight + e * w_e + rows.to(tl.int64)[:, None] * w_b + columns[None, :]
    tile = tl.load(tile_at, mask, 0.0)
    for step in range(b):
        j = tl.cast(step, tl.int64)
        g = tl.load(groups + e * g_e + j * g_b).to(tl.int64)
        w = tl.sum(tl.where(rows[:, None] == step, tile, 0.0), 0)
        s = tl.load(scale + e * s_e + g * s_g + columns, inside, 1.0)
        v = tl.minimum(tl.maximum(tl.div_rn(w, s), tl.load(low + e * lo_e + g * lo_g + columns, inside, 0.0)),
                       tl.load(high + e * hi_e + g * hi_g + columns, inside, 0.0))  # fmt: skip
        level = (v + _ROUND) - _ROUND
        pivot = tl.load(upper + e * u_e + j * u_b + j * u_r)
        error = tl.div_rn(w - level * s, tl.zeros_like(w) + pivot)
        tl.store(levels + e * l_e + j * l_b + columns, level, inside)
        tl.store(errors + e * r_e + j * r_b + columns, error, inside)
        later = (rows > step) & (rows < b)
        u = tl.load(upper + e * u_e + j * u_b + rows.to(tl.int64) * u_r, later, 0.0)
        tile -= u[:, None] * error[None, :]
    tl.store(tile_at, tile, mask)


@triton.jit
def descend_kernel(
    value, gradient, hessian, scale, low, high, groups, b, n,
    v_e, v_b, d_e, d_b, h_e, h_b, h_r, s_e, s_g, lo_e, lo_g, hi_e, hi_g, g_e, g_b,
    BLOCK: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """See `descend`; strides as in `spread_kernel`."""
    e = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * STRIP + tl.arange(0, STRIP)
    rows = tl.arange(0, BLOCK)
    inside = columns < n
    mask = (rows < b)[:, None] & inside[None, :]
    tile_at = gradient + e * d_e + rows.to(tl.int64)[:, None] * d_b + columns[None, :]
    tile = tl.load(tile_at, mask, 0.0)
    for step in range(b):
        j = tl.cast(step, tl.int64)
        g = tl.load(groups + e * g_e + j * g_b).to(tl.int64)
        slope = tl.sum(tl.where(rows[:, None] == step, tile, 0.0), 0)
        value_at = value + e * v_e + j * v_b + columns
        old = tl.load(value_at, inside, 0.0)
        s = tl.load(scale + e * s_e + g * s_g + columns, inside, 1.0)
        pivot = tl.load(hessian + e * h_e + j * h_b + j * h_r)
        best = tl.div_rn(old + slope * tl.div_rn(1.0, pivot), s)
        best = tl.minimum(tl.maximum(best, tl.load(low + e * lo_e + g * lo_g + columns, inside, 0.0)),
                          tl.load(high + e * hi_e + g * hi_g + columns, inside, 0.0))  # fmt: skip
        new = ((best + _ROUND) - _ROUND) * s
        tl.store(value_at, new, inside)
        later = (rows > step) & (rows < b)
        h = tl.load(hessian + e * h_e + j * h_b + rows.to(tl.int64) * h_r, later, 0.0)
        tile += h[:, None] * (old - new)[None, :]
    tl.store(tile_at, tile, mask)


def spread(
    weight: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    groups: torch.Tensor,
    levels: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Round the columns of a block in order, each error spread over those after it.

    weight [E, B, N]: changed; upper [E, B, B]; scale, low, high [E, G, N]; groups: int32 [E, B], the row of G that a
    column uses; levels, errors [E, B, N]: written. fp32, last dimensions contiguous but for `upper`; B <= `LARGEST`.
    """
    tensors = (weight, upper, scale, low, high, groups, levels, errors)
    strides = [
        *weight.stride()[:2],
        *upper.stride(),
        *scale.stride()[:2],
        *low.stride()[:2],
        *high.stride()[:2],
    ]
    strides += [*groups.stride(), *levels.stride()[:2], *errors.stride()[:2]]
    _launch(spread_kernel, weight.shape, tensors, strides)


def descend(
    value: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    groups: torch.Tensor,
) -> None:
    """One step of coordinate descent for every column of a block, in order.

    value, gradient [E, B, N]: changed; hessian [E, B, B]; the others as in `spread`.
    """
    tensors = (value, gradient, hessian, scale, low, high, groups)
    strides = [*value.stride()[:2], *gradient.stride()[:2], *hessian.stride(), *scale.stride()[:2]]
    strides += [*low.stride()[:2], *high.stride()[:2], *groups.stride()]
    _launch(descend_kernel, value.shape, tensors, strides)


def _launch(
    kernel: triton.JITFunction,
    shape: torch.Size,
    tensors: tuple[torch.Tensor, ...],
    strides: list[int],
) -> None:
    experts, b, n = shape
    if b > LARGEST:
        raise ValueError(f"a block has {b} columns; use at most {LARGEST}")
    block = triton.next_power_of_2(b)
    strip = min(_ENTRIES // block, 32)
    grid = (triton.cdiv(n, strip), experts)
    kernel[grid](*tensors, b, n, *strides, BLOCK=block, STRIP=strip, num_warps=1)
