"""Kernels of 8-bit products, W8A8 int8 and FP8: inputs rounded to codes, and y = sum of sx sw sum (qx - zx) qw + b.

The weights are the left operand, y^T [N, M] = W [N, K] x^T [K, M], as in `linear.py`: tiles of 16 tokens waste little.
Sums of int8 products are exact. With one scale per token and row, scales and zero points are applied once, at the end:
sum (qx - zx) qw = sum qx qw - zx sum qw, and the sums of the rows of W are known. With groups of columns each group's
sum is scaled in fp32.

With few tokens a program rounds the inputs itself: it reads them twice, first for the largest of each token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels.triton.linear import finish
from quantkit_kernels.triton.splits import leave_part, sum_parts

_ROUND = tl.constexpr(
    12582912.0
)  # 1.5 * 2^23: adding and subtracting it rounds to an integer, halves to even
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def fp8_byte(v):
    """The FP8 E4M3 nearest to v, fp32 of at most 448 in size, as a byte: for processors without the instruction."""
    bits = v.to(tl.int32, bitcast=True)
    a = bits & 0x7FFFFFFF
    # the bias of the exponent is 120 less, and of the mantissa 3 bits are left
    normal = ((a + 0x7FFFF + ((a >> 20) & 1)) >> 20) - 960
    small = (tl.abs(v) * 512.0 + _ROUND) - _ROUND  # below 2^-6 steps of 2^-9
    value = tl.where(a < 0x3C800000, small.to(tl.int32), normal)
    return (value | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def encode(v, FP8: tl.constexpr, CAST: tl.constexpr):
    """The codes of v, fp32 in units of the scale. CAST: FP8 by the processor's instruction, else by arithmetic."""
    if FP8:
        v = tl.minimum(tl.maximum(v, -448.0), 448.0)
        if CAST:
            code = v.to(tl.float8e4nv)
        else:
            code = fp8_byte(v).to(tl.float8e4nv, bitcast=True)
    else:
        v = tl.minimum(tl.maximum((v + _ROUND) - _ROUND, -128.0), 127.0)
        code = v.to(tl.int8)
    return code


@triton.jit
def scale_of(most, FP8: tl.constexpr):
    """The scale of values that are `most` at most."""
    scale = most / (448.0 if FP8 else 127.5)
    return tl.where(scale < _TINY, _TINY, scale)  # NaN stays NaN


@triton.jit
def larger(most, v):
    """Elementwise max(most, |v|) in fp32; NaN stays NaN."""
    return tl.maximum(most, tl.abs(v.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(most, axis: tl.constexpr):
    """The largest of non-negative numbers along an axis; NaN if one is, or is infinite."""
    return tl.max(most, axis) + tl.sum(most * 0.0, axis)


@triton.jit
def quantize_kernel(
    x,  # [M, K], rows ldx apart
    codes,  # int8 or fp8 [M, K]
    scales,  # fp32 [M, K/GROUP] (GROUP 0: [M]) to write; or one to read if STATIC
    zero,  # int32 [1] if HAS_ZERO
    k,
    ldx,
    groups,
    FP8: tl.constexpr,
    CAST: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BK: tl.constexpr,  # columns at a time: GROUP if there are groups
):
    """Program = token: its codes and scales."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BK)
    scale = 1.0
    shift = 0.0
    if STATIC:
        scale = tl.load(scales)
        if HAS_ZERO:
            shift = tl.load(zero).to(tl.float32)
    elif GROUP == 0:
        most = tl.zeros([BK], tl.float32)
        for start in tl.range(0, k, BK):
            at = start + column
            v = tl.load(x + token * ldx + at, mask=at < k, other=0.0, eviction_policy="evict_last")
            most = larger(most, v)
        scale = scale_of(largest(most, 0), FP8)
        tl.store(scales + token, scale)
    for start in tl.range(0, k, BK):
        at = start + column
        v = tl.load(x + token * ldx + at, mask=at < k, other=0.0).to(tl.float32)
        if GROUP > 0:
            scale = scale_of(largest(tl.abs(v), 0), FP8)
            tl.store(scales + token * groups + start // GROUP, scale)
        tl.store(codes + token * k + at, encode(v / scale + shift, FP8, CAST), mask=at < k)


@triton.jit
def _inputs(x, m, n_m, k, ldx, at, EVEN_K: tl.constexpr, BK: tl.constexpr):
    """x [BM, BK] from column `at` on; 0 beyond x."""
    column = at + tl.arange(0, BK)
    mask = (m < n_m)[:, None]
    if not EVEN_K:
        mask = mask & (column < k)[None, :]
    return tl.load(
        x + m.to(tl.int64)[:, None] * ldx + column[None, :],
        mask=mask,
        other=0.0,
        eviction_policy="evict_last",
    )


@triton.jit(do_not_specialize=["n_m"])
def scaled_linear_kernel(
    x,  # FUSED: floats, else codes [M, K], rows ldx apart
    w,  # codes [N, K]
    x_scale,  # fp32 [M, K/GROUP], rows x_scales apart (0: one for all); not read if FUSED
    x_zero,  # int32 [1] if HAS_ZERO
    w_scale,  # fp32 [ceil(N/ROWS), K/GROUP]
    sums,  # int32 [N], of the rows of w, if HAS_ZERO
    bias,  # [N] if HAS_BIAS
    y,  # [M, N]
    parts,  # fp32 [tiles, splits, BM, BN] if SPLIT
    tickets,  # int32 [tiles], all 0 before and after
    n_m,
    n,
    k,
    ldx,
    x_scales,
    groups,
    trips,
    FP8: tl.constexpr,
    CAST: tl.constexpr,
    FUSED: tl.constexpr,
    GROUP: tl.constexpr,  # columns per scale, a multiple of BK; 0: whole rows
    ROWS: tl.constexpr,  # rows of w per scale
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (tile of M fastest, tile of N, split): y[tile]."""
    tiles_m = tl.cdiv(n_m, BM)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    m = (tile % tiles_m) * BM + tl.arange(0, BM)
    rows = tile // tiles_m * BN + tl.arange(0, BN)
    inside = tl.minimum(rows, n - 1)
    token = tl.minimum(m, n_m - 1)
    if FUSED:
        most = tl.zeros([BM, BK], tl.float32)
        for trip in tl.range(0, trips):
            most = larger(most, _inputs(x, m, n_m, k, ldx, trip * BK, EVEN_K, BK))
        sx = scale_of(largest(most, 1), FP8)
    elif GROUP == 0:
        sx = tl.load(x_scale + token * x_scales)
    if GROUP > 0 or FP8:
        acc = tl.zeros([BN, BM], tl.float32)
    else:
        acc = tl.zeros([BN, BM], tl.int32)
    each = tl.cdiv(trips, splits)
    for trip in tl.range(split * each, tl.minimum(split * each + each, trips), num_stages=STAGES):
        column = trip * BK + tl.arange(0, BK)
        at = w + inside.to(tl.int64)[:, None] * k + column[None, :]
        if EVEN_K:
            wt = tl.load(at, eviction_policy="evict_first")
        else:
            wt = tl.load(at, mask=(column < k)[None, :], other=0.0, eviction_policy="evict_first")
        q = _inputs(x, m, n_m, k, ldx, trip * BK, EVEN_K, BK)
        if FUSED:
            q = encode(q.to(tl.float32) / sx[:, None], FP8, CAST)
        if GROUP > 0:
            g = trip * BK // GROUP
            part = tl.dot(wt, tl.trans(q))
            sw = tl.load(w_scale + inside // ROWS * groups + g)
            sxg = tl.load(x_scale + token * x_scales + g)
            acc += part.to(tl.float32) * sw[:, None] * sxg[None, :]
        elif FP8:
            acc = tl.dot(wt, tl.trans(q), acc)
        else:
            acc = tl.dot(wt, tl.trans(q), acc, out_dtype=tl.int32)
    if GROUP == 0:
        if HAS_ZERO:  # noqa: SIM102, known when compiled, the other is not
            if split == 0:
                acc -= tl.load(x_zero) * tl.load(sums + inside)[:, None]
        acc = acc.to(tl.float32) * tl.load(w_scale + inside // ROWS)[:, None] * sx[None, :]
    mask = (m < n_m)[None, :]
    if SPLIT:
        if leave_part(acc, parts, tickets, tile, split, splits, mask, BN, BM) == splits - 1:
            finish(sum_parts(parts, tickets, tile, splits, mask, BN, BM), bias, y, m, rows, n_m, n, HAS_BIAS)
    else:
        finish(acc, bias, y, m, rows, n_m, n, HAS_BIAS)
