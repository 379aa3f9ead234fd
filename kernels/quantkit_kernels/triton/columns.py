"""GPTQ's loops over the columns of a block as one kernel launch, for E weights of one shape.

A program keeps [B, strip] of one transposed weight in the registers of one warp and goes through its B rows (columns of
the weight). Each step takes its row out by a masked sum, rounds it, and subtracts an outer product from the rows after
it. Divisions follow IEEE 754; products and sums may be fused, so the last bits may differ from those on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it to |x| < 2^22 rounds to an integer, ties to even


@triton.jit
def _nearest(x, low, high, at, inside):
    """The integer nearest to x within the lowest and the highest level."""
    x = tl.maximum(x, tl.load(low + at, inside, 0.0), propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, tl.load(high + at, inside, 0.0), propagate_nan=tl.PropagateNan.ALL)
    return (x + _ROUND) - _ROUND


@triton.jit
def spread_kernel(
    weight, matrix, scale, low, high, group_of, levels, errors, b, n, groups, w_e, w_b, m_e, m_b, m_r,
    BLOCK: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """See `spread` of columns_op. w, m: strides of weight, levels and errors, and of the matrix."""
    e = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * STRIP + tl.arange(0, STRIP)
    rows = tl.arange(0, BLOCK)
    inside = columns < n
    first = e * w_e + columns
    tile_at = first[None, :] + rows.to(tl.int64)[:, None] * w_b
    tile = tl.load(weight + tile_at, (rows < b)[:, None] & inside[None, :], 0.0)
    for step in range(b):
        j = tl.cast(step, tl.int64)
        at = (e * groups + tl.load(group_of + e * b + j)) * n + columns
        row = matrix + e * m_e + j * m_b
        w = tl.sum(tl.where(rows[:, None] == step, tile, 0.0), 0)
        s = tl.load(scale + at, inside, 1.0)
        level = _nearest(tl.div_rn(w, s), low, high, at, inside)
        error = tl.div_rn(w - level * s, tl.zeros_like(w) + tl.load(row + j * m_r))
        tl.store(levels + first + j * w_b, level, inside)
        tl.store(errors + first + j * w_b, error, inside)
        later = tl.load(row + rows.to(tl.int64) * m_r, (rows > step) & (rows < b), 0.0)
        tile -= later[:, None] * error[None, :]


@triton.jit
def descend_kernel(
    value, gradient, matrix, scale, low, high, group_of, b, n, groups, v_e, v_b, d_e, d_b, m_e, m_b, m_r,
    BLOCK: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """See `descend` of columns_op. v, d, m: strides of the value, the gradient and the matrix."""
    e = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * STRIP + tl.arange(0, STRIP)
    rows = tl.arange(0, BLOCK)
    inside = columns < n
    tile_at = e * d_e + rows.to(tl.int64)[:, None] * d_b + columns[None, :]
    tile = tl.load(gradient + tile_at, (rows < b)[:, None] & inside[None, :], 0.0)
    for step in range(b):
        j = tl.cast(step, tl.int64)
        at = (e * groups + tl.load(group_of + e * b + j)) * n + columns
        row, value_at = matrix + e * m_e + j * m_b, value + e * v_e + j * v_b + columns
        slope = tl.sum(tl.where(rows[:, None] == step, tile, 0.0), 0)
        old = tl.load(value_at, inside, 0.0)
        s = tl.load(scale + at, inside, 1.0)
        wanted = old + slope * tl.div_rn(1.0, tl.load(row + j * m_r))
        new = _nearest(tl.div_rn(wanted, s), low, high, at, inside) * s
        tl.store(value_at, new, inside)
        later = tl.load(row + rows.to(tl.int64) * m_r, (rows > step) & (rows < b), 0.0)
        tile -= later[:, None] * (new - old)[None, :]
