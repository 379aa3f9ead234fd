"""y = x W^T + b on the storage of `layout.py`, and W itself.

The weights are the left operand of the product, y^T [N, M] = W [N, K] x^T [K, M]: they then go from memory to the
tensor cores through registers, never back to shared memory, and a tile of 8 or 16 tokens wastes little at M = 1. Codes
become q - z exactly (`unpack.py`; plain arithmetic if ASM is False), a group's product is scaled in the fp32
accumulator: acc += s * (q - z) x, so that nothing is rounded before the end and a zero point costs what none costs.

K may be split over programs (`splits.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels.triton.layout import HIGH_BITS
from quantkit_kernels.triton.splits import leave_part, sum_parts


@triton.jit
def _plane(
    codes,
    block,
    last,
    chunk,
    chunks,
    plane,
    BN: tl.constexpr,
    H: tl.constexpr,
    PLANES: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    """Bytes [BN, H] of one plane, rows from 64 * block on; blocks past the last one repeat it."""
    row = tl.arange(0, BN // 2)
    where = tl.minimum(block + row // 32, last).to(tl.int64) * chunks + chunk
    at = codes + (where * PLANES + plane) * (64 * H) + (row % 32) * (2 * H)
    tile = tl.load(at[:, None] + tl.arange(0, 2 * H)[None, :], eviction_policy="evict_first")
    if BY_ROW:
        tile = tl.trans(tile.reshape(BN // 64, H // 16, 64, 16), 0, 2, 1, 3)
    else:
        tile = tl.trans(tile.reshape(BN // 16, 8, H // 32, 4, 2, 2, 2, 2), 0, 6, 1, 2, 4, 5, 3, 7)
    return tile.reshape(BN, H)


@triton.constexpr_function
def _high_bit(field: int) -> int:
    return HIGH_BITS[field]


@triton.jit
def _field(w, high, zero, f: tl.constexpr, half: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr):
    """Field f of the bytes w [BN, H] as fp32 q - z, without assembly. zero: fp32 [BN, 1]."""
    if FP8:
        word = w.to(tl.int32)
        value = ((word & 0x80) << 24) | ((word & 0x7F) << 20)
        return (
            value.to(tl.float32, bitcast=True) * 1.329227995784916e36
        )  # 2^120, the distance of the exponents
    q = w
    if BITS == 4:
        q = (w >> (4 * f)) & 15
    if BITS < 4:
        q = (w >> (2 * f)) & 3
    if BITS == 3:
        q = q | (((high >> _high_bit(4 * half + f)) & 1) << 2)
    return q.to(tl.float32) - zero


@triton.constexpr_function
def _part(text: str, i: int) -> str:
    return text.split("|")[i]


@triton.constexpr_function
def _count(text: str) -> int:
    return text.count("|") + 1


@triton.constexpr_function
def _number(text: str, i: int) -> float:
    return float(text.split("|")[i])


@triton.jit
def _fields(
    w,
    high,
    zero,
    i: tl.constexpr,
    ASM: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    BASES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    KIND: tl.constexpr,
):
    """STEP fields of the bytes w [BN, H] as q - z in the activations' type, by block i of the assembly."""
    text: tl.constexpr = _part(ASM, 2 * i)
    constraints: tl.constexpr = _part(ASM, 2 * i + 1)
    less = (-(_number(BASES, 0) + zero)).to(KIND)[:, None]
    args = (w, high) if BITS == 3 else (w,)
    if HAS_ZEROS:
        args = args + (less,)  # noqa: RUF005, Triton knows no unpacking
        for j in tl.static_range(1, _count(BASES)):
            args = args + ((-(_number(BASES, j) + zero)).to(KIND)[:, None],)  # noqa: RUF005
    if STEP == 1:
        v = (tl.inline_asm_elementwise(text, constraints, args, dtype=less.dtype, is_pure=True, pack=4),)
    elif STEP == 2:
        v = tl.inline_asm_elementwise(
            text, constraints, args, dtype=(less.dtype, less.dtype), is_pure=True, pack=4
        )
    else:
        v = tl.inline_asm_elementwise(
            text,
            constraints,
            args,
            dtype=(less.dtype, less.dtype, less.dtype, less.dtype),
            is_pure=True,
            pack=4,
        )
    return v


@triton.jit
def _group(at, inside: tl.constexpr, TRIP: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr):
    """The group of column `at`, counted from the first one of a word; a constant if trips begin with a word."""
    if TRIP % SHARE == 0:
        group = inside % SHARE // GROUP
    else:
        group = at // GROUP
    return group


@triton.jit
def _float(word, g, SCALES: tl.constexpr):
    """The scale or zero point of group g as fp32, out of 32 bits that hold it. SCALES: the type they have."""
    if SCALES == "fp32":
        value = word.to(tl.float32, bitcast=True)
    elif SCALES == "bf16":
        value = ((word >> (g % 2 * 16)) << 16).to(tl.float32, bitcast=True)
    else:
        value = (word >> (g % 2 * 16)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _inputs(x, token, live, k, ldx, at, H: tl.constexpr, EVEN_K: tl.constexpr):
    """x^T [H, BM] of rows `token` from column `at` on; 0 where they are not live, and beyond x."""
    column = at + tl.arange(0, H)
    mask = live[None, :]
    if not EVEN_K:
        mask = mask & (column < k)[:, None]
    return tl.load(
        x + token.to(tl.int64)[None, :] * ldx + column[:, None],
        mask=mask,
        other=0.0,
        eviction_policy="evict_last",
    )


@triton.jit
def products(
    x,
    codes,
    scales,
    zeros,
    token,  # [BM], rows of x
    live,  # [BM], which of them there are
    block,  # 64 rows of the weight each, the first of the tile and the last of the weight
    last,
    stored,  # [BN], the first word of scales of each row
    k,
    ldx,
    chunks,
    begin,  # trips of this program
    end,
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
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """W x^T [BN, BM] of a tile in fp32, over some trips; the arguments of `linear_kernel`."""
    FIELDS: tl.constexpr = 1 if BITS == 8 else 4 if BITS < 4 else 2
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    CHUNK: tl.constexpr = H * FIELDS * HALVES
    TRIP: tl.constexpr = CHUNK * UNROLL
    SHARE: tl.constexpr = GROUP * (1 if SCALES == "fp32" else 2)  # columns of a word of scales
    KIND: tl.constexpr = x.dtype.element_ty
    zero = tl.full([BN], ZERO, tl.float32)
    if HAS_ZEROS and GROUP == 0:
        zero = _float(tl.load(zeros + stored), 0, SCALES)
    acc = tl.zeros([BN, BM], tl.float32)
    for trip in tl.range(begin, end, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            chunk = trip * UNROLL + u
            high = None
            if BITS == 3:
                high = _plane(codes, block, last, chunk, chunks, 2, BN, H, PLANES, BY_ROW)
            for half in tl.static_range(HALVES):
                w = _plane(codes, block, last, chunk, chunks, half, BN, H, PLANES, BY_ROW)
                part = tl.zeros([BN, BM], tl.float32)
                for f in tl.static_range(FIELDS):
                    at = chunk * CHUNK + (half * FIELDS + f) * H
                    if GROUP > 0 and f % RUN == 0:
                        g = _group(at, ((u * HALVES + half) * FIELDS + f) * H, TRIP, SHARE, GROUP)
                        if TRIP % SHARE > 0 or (((u * HALVES + half) * FIELDS + f) * H) % SHARE == 0:
                            word = stored + (at // SHARE) * 64
                            s_word = tl.load(scales + word)
                            if HAS_ZEROS:
                                z_word = tl.load(zeros + word)
                        scale = _float(s_word, g, SCALES)
                        if HAS_ZEROS:
                            zero = _float(z_word, g, SCALES)
                    if ASM is None:
                        v = _field(w, high, zero[:, None], f, half, BITS, FP8).to(KIND)
                    else:
                        if f % STEP == 0:
                            vs = _fields(
                                w,
                                high,
                                zero,
                                (half * FIELDS + f) // STEP,
                                ASM,
                                STEP,
                                BITS,
                                BASES,
                                HAS_ZEROS,
                                KIND,
                            )
                        v = vs[f % STEP]
                    xt = _inputs(x, token, live, k, ldx, at, H, EVEN_K)
                    if GROUP == 0:
                        acc = tl.dot(v, xt, acc, input_precision="ieee")
                    else:
                        part = tl.dot(v, xt, part, input_precision="ieee")
                        if (f + 1) % RUN == 0:
                            acc += part * scale[:, None]
                            part = tl.zeros([BN, BM], tl.float32)
    if GROUP == 0:
        acc *= _float(tl.load(scales + stored), 0, SCALES)[:, None]
    return acc


@triton.jit
def finish(acc, bias, y, m, rows, n_m, n, HAS_BIAS: tl.constexpr):
    """y^T [rows, m] = acc + bias, rounded once."""
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y + m.to(tl.int64)[None, :] * n + rows[:, None],
        acc.to(y.dtype.element_ty),
        mask=(rows < n)[:, None] & (m < n_m)[None, :],
    )


@triton.jit(do_not_specialize=["n_m"])
def linear_kernel(
    x,  # [M, K], rows ldx apart
    codes,  # uint8 [N'/64, chunks, planes, 32, 2H], or [..., H/16, 1024] if BY_ROW
    scales,  # int32 [N'/64, words, 64], each word those of one or two groups
    zeros,  # the same if HAS_ZEROS
    bias,  # [N] if HAS_BIAS
    y,  # [M, N]
    parts,  # fp32 [tiles, splits, BM, BN] if SPLIT
    tickets,  # int32 [tiles], all 0 before and after
    n_m,
    n,
    k,
    ldx,
    words,
    chunks,
    trips,
    BITS: tl.constexpr,  # 2, 3, 4, 8: what is stored
    FP8: tl.constexpr,
    ZERO: tl.constexpr,  # of all groups if not HAS_ZEROS
    BASES: tl.constexpr,  # see unpack.bases
    SCALES: tl.constexpr,  # their type: bf16, fp16, fp32
    GROUP: tl.constexpr,  # 0: one scale per row
    H: tl.constexpr,
    PLANES: tl.constexpr,
    BY_ROW: tl.constexpr,  # the order of the bytes in a plane
    RUN: tl.constexpr,  # fields in a row that share a group
    STEP: tl.constexpr,  # fields that one block of assembly unpacks
    BM: tl.constexpr,
    BN: tl.constexpr,
    UNROLL: tl.constexpr,  # chunks per trip
    SPLIT: tl.constexpr,  # whether there are several programs per tile, then program_id(1) counts them
    EVEN_K: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,  # assembly|constraints|assembly|... or None
    STAGES: tl.constexpr,
):
    """Program (tile of M fastest, tile of N, split): y[tile] = x W^T + bias."""
    tiles_m = tl.cdiv(n_m, BM)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    pid_n = tile // tiles_m
    m = (tile % tiles_m) * BM + tl.arange(0, BM)
    rows = pid_n * BN + tl.arange(0, BN)
    block = pid_n * (BN // 64)
    last = (n - 1) // 64
    stored = tl.minimum(block + tl.arange(0, BN) // 64, last) * words * 64 + rows % 64

    each = tl.cdiv(trips, splits)
    acc = products(
        x,
        codes,
        scales,
        zeros,
        m,
        m < n_m,
        block,
        last,
        stored,
        k,
        ldx,
        chunks,
        split * each,
        tl.minimum(split * each + each, trips),
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

    if SPLIT:
        mask = (m < n_m)[None, :]
        if leave_part(acc, parts, tickets, tile, split, splits, mask, BN, BM) == splits - 1:
            acc = sum_parts(parts, tickets, tile, splits, mask, BN, BM)
            finish(acc, bias, y, m, rows, n_m, n, HAS_BIAS)
    else:
        finish(acc, bias, y, m, rows, n_m, n, HAS_BIAS)


@triton.jit
def dequantize_kernel(
    codes,
    scales,
    zeros,
    out,  # [N, K]
    n,
    k,
    words,
    chunks,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    ZERO: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    PLANES: tl.constexpr,
    BY_ROW: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    """Program (chunk, 64 rows): out = (q - z) * s in fp32, rounded once."""
    FIELDS: tl.constexpr = 1 if BITS == 8 else 4 if BITS < 4 else 2
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    SHARED: tl.constexpr = 1 if SCALES == "fp32" else 2
    KIND: tl.constexpr = out.dtype.element_ty
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    rows = block * 64 + tl.arange(0, 64)
    zero = tl.full([64], ZERO, tl.float32)
    high = None
    if BITS == 3:
        high = _plane(codes, block, block, chunk, chunks, 2, 64, H, PLANES, BY_ROW)
    for half in tl.static_range(HALVES):
        w = _plane(codes, block, block, chunk, chunks, half, 64, H, PLANES, BY_ROW)
        for f in tl.static_range(FIELDS):
            at = chunk * (H * FIELDS * HALVES) + (half * FIELDS + f) * H
            g = at // GROUP if GROUP > 0 else 0
            word = (block * words + g // SHARED) * 64 + tl.arange(0, 64)
            scale = _float(tl.load(scales + word), g, SCALES)
            if HAS_ZEROS:
                zero = _float(tl.load(zeros + word), g, SCALES)
            column = at + tl.arange(0, H)
            v = _field(w, high, zero[:, None], f, half, BITS, FP8) * scale[:, None]
            where = out + rows.to(tl.int64)[:, None] * k + column[None, :]
            tl.store(where, v.to(KIND), mask=(rows < n)[:, None] & (column < k)[None, :])
