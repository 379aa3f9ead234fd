"""The kernel of `grouped_op.py`: the products of all experts of a mixture in one launch.

Weights of experts are stored one behind the other, each as in `layout.py`. Slots, that is (token, expert) pairs, are
sorted by expert, so that a tile of slots is of one expert. A program finds its tile in the experts' offsets, which
stay on the device: nothing waits for the counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels.triton.linear import finish, products


@triton.jit
def _tile(offsets, experts, tile, BM: tl.constexpr, EP: tl.constexpr):
    """(expert, first slot, end of its slots) of a tile of BM slots; expert = experts if there is none."""
    e = tl.arange(0, EP)
    begin = tl.load(offsets + e, mask=e < experts, other=0)
    end = tl.load(offsets + e + 1, mask=e < experts, other=0)
    tiles = tl.cdiv(end - begin, BM)
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= tile) & (tile < before + tiles)
    expert = tl.sum(tl.where(mine, e, 0), 0) + tl.where(tl.sum(mine.to(tl.int32), 0) == 0, experts, 0)
    first = tl.sum(tl.where(mine, begin + (tile - before) * BM, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def grouped_kernel(
    x,  # [T, K], rows ldx apart
    codes,  # [E, N'/64, ...] as in `linear_kernel`
    scales,
    zeros,
    bias,  # [E, N] if HAS_BIAS
    y,  # [S, N]
    index,  # int64 [S], the row of x of each slot
    offsets,  # int64 [E + 1], where the slots of each expert begin
    experts,
    n,
    k,
    ldx,
    words,
    chunks,
    trips,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    ZERO: tl.constexpr,
    BASES: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    PLANES: tl.constexpr,
    BY_ROW: tl.constexpr,
    RUN: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
    EP: tl.constexpr,  # a power of two, at least the number of experts
):
    """Program (tile of slots fastest, tile of N): y[slots] = x[their rows] W_e^T + bias_e."""
    expert, first, end = _tile(offsets, experts, tl.program_id(0), BM, EP)
    if expert >= experts:
        return
    slot = first.to(tl.int32) + tl.arange(0, BM)
    end = end.to(tl.int32)
    live = slot < end
    token = tl.load(index + slot, mask=live, other=0)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    block = tl.program_id(1) * (BN // 64)
    last = (n - 1) // 64
    stored = tl.minimum(block + tl.arange(0, BN) // 64, last) * words * 64 + rows % 64
    blocks = expert.to(tl.int64) * (last + 1)
    acc = products(
        x,
        codes + blocks * chunks * (PLANES * 64 * H),
        scales + blocks * words * 64,
        zeros + blocks * words * 64,
        token,
        live,
        block,
        last,
        stored,
        k,
        ldx,
        chunks,
        0,
        trips,
        BITS,
        FP8,
        ZERO,
        BASES,
        SCALES,
        GROUP,
        H,
        PLANES,
        BY_ROW,
        RUN,
        STEP,
        BM,
        BN,
        UNROLL,
        EVEN_K,
        HAS_ZEROS,
        ASM,
        STAGES,
    )
    finish(acc, bias + expert.to(tl.int64) * n, y, slot, rows, end, n, HAS_BIAS)
