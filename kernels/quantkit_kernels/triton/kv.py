"""Kernels of a quantized KV cache: writing entries as codes, and attention of one new token per sequence over them.

Scales are one per token and kv head, so they never meet the head dimension: a key's scale multiplies its scores, a
value's its probability. The query heads of one kv head form one tile.

The sequence is divided among programs (flash decoding, Dao et al. 2023). Each leaves its largest score, its sum and its
fp32 output, and the last one of a kv head puts them together, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit_kernels.triton.scaled import fp8_byte, larger, largest

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _put(
    x,
    codes,
    scales,
    stored,
    place,
    at,
    kept,
    lane,
    mask,
    FP8: tl.constexpr,
    CAST: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Code one entry. x: its numbers; at: of its codes, kept: of its scale."""
    v = tl.load(x + lane, mask=mask, other=0.0).to(tl.float32)
    if STATIC:
        v = tl.div_rn(v, tl.load(stored))
    else:
        scale = largest(larger(tl.zeros_like(v), v), 0) / (448.0 if FP8 else 127.0)
        scale = tl.where(scale < 1e-6, 1e-6, scale)
        tl.store(scales + kept, scale)
        v = v * tl.div_rn(1.0, scale)
    if FP8:
        v = tl.minimum(tl.maximum(v, -448.0), 448.0)
        if CAST:
            code = v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            code = fp8_byte(v)
    else:  # halves away from zero; a conversion to integers drops the fraction
        code = tl.minimum(tl.maximum(tl.where(v < 0, v - 0.5, v + 0.5), -128.0), 127.0).to(tl.int8)
    tl.store(codes + at + lane, code, mask=mask)


@triton.jit
def write_kernel(
    k,  # [B, H, T, D], strides as said
    v,
    k_codes,  # [B, H, S, D], FP8 as bytes
    v_codes,
    k_scales,  # fp32 [B, H, S], to write; [H] to read if STATIC
    v_scales,
    begin,  # int32 [B]: the place of the first of the T tokens
    heads,
    tokens,
    places,
    d,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    FP8: tl.constexpr,
    CAST: tl.constexpr,
    STATIC: tl.constexpr,
    D: tl.constexpr,
):
    """Program (token, sequence and head): the codes and scales of its key and value."""
    token = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64) // heads
    h = tl.program_id(1) % heads
    lane = tl.arange(0, D)
    place = tl.load(begin + b) + token
    kept = (b * heads + h) * places + place
    mask = lane < d
    _put(
        k + b * k_b + h * k_h + token * k_t,
        k_codes,
        k_scales,
        k_scales + h,
        place,
        kept * d,
        kept,
        lane,
        mask,
        FP8,
        CAST,
        STATIC,
    )
    _put(
        v + b * v_b + h * v_h + token * v_t,
        v_codes,
        v_scales,
        v_scales + h,
        place,
        kept * d,
        kept,
        lane,
        mask,
        FP8,
        CAST,
        STATIC,
    )


@triton.jit
def _numbers(codes, KIND: tl.constexpr, FP8: tl.constexpr, CAST: tl.constexpr):
    """Codes as floats of the type KIND, exactly (FP8 in bf16 and fp16, int8 in both)."""
    if FP8:
        if CAST:
            out = codes.to(tl.float8e4nv, bitcast=True).to(KIND)
        else:  # exponent and mantissa moved to fp32, whose bias is 120 more
            word = codes.to(tl.int32)
            out = ((word & 0x80) << 24) | ((word & 0x7F) << 20)
            out = (out.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(KIND)
    else:
        out = codes.to(KIND)
    return out


@triton.jit
def decode_kernel(
    q,  # [B, heads, D]
    k,  # int8, or uint8 of FP8, [B, H, S, D]
    v,
    k_scales,  # fp32 [B, H, S]; [H] if STATIC
    v_scales,
    first,  # int32 [B]
    end,
    out,  # [B, heads, D]
    parts,  # fp32 [B H, splits, M, D + 2] if there are several splits
    tickets,  # int32 [B H]
    kv_heads,
    group,
    places,
    d,
    factor,  # of q k^T
    softcap,
    FP8: tl.constexpr,
    CAST: tl.constexpr,
    STATIC: tl.constexpr,
    CAPPED: tl.constexpr,
    M: tl.constexpr,  # query heads of a kv head, rounded up
    D: tl.constexpr,
    BS: tl.constexpr,  # places at a time
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (sequence and kv head, split): its places of the sequence."""
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    b = pair // kv_heads
    h = pair % kv_heads
    KIND: tl.constexpr = q.dtype.element_ty
    head = tl.arange(0, M)
    lane = tl.arange(0, D)
    inner = lane < d
    to = (b * kv_heads * group + h * group + head[:, None]) * d + lane[None, :]
    rows = (head < group)[:, None] & inner[None, :]
    queries = tl.load(q + to, mask=rows, other=0.0)  # (M, D)
    begin, last = tl.load(first + b), tl.load(end + b)
    each = tl.cdiv(tl.cdiv(last - begin, splits), BS) * BS
    start = begin + split * each
    stop = tl.minimum(start + each, last)
    factor *= _LOG2E
    if STATIC:
        factor *= tl.load(k_scales + h)
    best = tl.full([M], -1e30, tl.float32)
    mass = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    base = pair * places
    for s in tl.range(start, stop, BS, num_stages=STAGES):
        place = s + tl.arange(0, BS)
        valid = place < stop
        at = (base + place)[:, None] * d + lane[None, :]
        there = valid[:, None] & inner[None, :]
        keys = _numbers(tl.load(k + at, mask=there, other=0), KIND, FP8, CAST)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor  # (M, BS)
        if not STATIC:
            scores *= tl.load(k_scales + base + place, mask=valid, other=0.0)[None, :]
        if CAPPED:
            e = tl.exp2(tl.abs(scores) * (-2.0 / softcap))
            scores = tl.where(scores < 0, -softcap, softcap) * (1.0 - e) / (1.0 + e) * _LOG2E
        scores = tl.where(valid[None, :], scores, -1e30)
        top = tl.maximum(best, tl.max(scores, 1))
        p = tl.exp2(scores - top[:, None])
        shrink = tl.exp2(best - top)
        mass = mass * shrink + tl.sum(p, 1)
        best = top
        if not STATIC:
            p *= tl.load(v_scales + base + place, mask=valid, other=0.0)[None, :]
        values = _numbers(tl.load(v + at, mask=there, other=0), KIND, FP8, CAST)
        acc = tl.dot(p.to(KIND), values, acc * shrink[:, None], input_precision="ieee")
    if STATIC:
        acc *= tl.load(v_scales + h)
    if SPLIT:
        place_of = head[:, None] * D + lane[None, :]
        mine = parts + pair * splits * (M * (D + 2))
        own = mine + split * (M * (D + 2))
        tl.store(own + head, best, cache_modifier=".cg")
        tl.store(own + M + head, mass, cache_modifier=".cg")
        tl.store(own + 2 * M + place_of, acc, cache_modifier=".cg")
        tl.debug_barrier()  # all stores of this program come before its ticket
        if tl.atomic_add(tickets + pair, 1, sem="acq_rel", scope="gpu") == splits - 1:
            best = tl.full([M], -1e30, tl.float32)
            mass = tl.zeros([M], tl.float32)
            acc = tl.zeros([M, D], tl.float32)
            for i in tl.range(0, splits):
                theirs = mine + i * (M * (D + 2))
                other = tl.load(theirs + head, cache_modifier=".cg")
                top = tl.maximum(best, other)
                shrink, grow = tl.exp2(best - top), tl.exp2(other - top)
                mass = mass * shrink + tl.load(theirs + M + head, cache_modifier=".cg") * grow
                part = tl.load(theirs + 2 * M + place_of, cache_modifier=".cg")
                acc = acc * shrink[:, None] + part * grow[:, None]
                best = top
            tl.store(tickets + pair, 0)
            tl.store(out + to, (acc / mass[:, None]).to(KIND), mask=rows)
    else:
        tl.store(out + to, (acc / mass[:, None]).to(KIND), mask=rows)
