"""The storage of a weight for tensor cores: each thread finds its own fragment in 16 contiguous bytes.

W [N, K] is padded to N' (a multiple of 64) and K' (a multiple of the chunk C) and cut into chunks of 64 rows and C
columns, stored one after the other along K, then N, so that a program streams one contiguous range:

    codes  uint8 [N'/64, K'/C, planes, 32, 2H]; float8_e4m3fn with the same shape for FP8 weights
    scales [N'/64, words, 64, 2] in the stored dtype (fp32: [N'/64, words, 64, 1]), 0 where padded
    zeros  the same, as floats, or None where every zero is 2^(bits-1)

The first axis counts blocks of 64 rows, so weights whose N is a multiple of 64 form one weight when they are
contiguous. The last axis of scales and zeros runs over consecutive groups, because 32 bits are the least that a thread
can copy to shared memory ahead of use. A trip of the loop over K usually takes both.

A plane is a tile of bytes [64, H]. Byte j of a row holds, from its low bits up, the columns j, j + H, j + 2H, ...: a
field is thus a [64, H] operand of its own and nothing is ever interleaved.

    bits  H                C    planes
    4     64, or 32        2H   1: two fields of 4 bits
    2     64, or 32        4H   1: four fields of 2 bits
    3     32               256  3: low 2 bits of columns 0-127, of columns 128-255, then bit 2 of column j + 32 i as
                                bit HIGH_BITS[i] of byte j
    5-8   up to 128        H    1: one field

Within a plane the 16-byte unit of thread (c, g) of a warp holds what it feeds into two m16n8k16 products: byte
(e, f, b, h) is row c + 8 b, column 16 e + 8 f + 2 g + h.

sm_100's tensor cores take a row from each thread. There (`reads_by_row`) a plane is [H/16, 1024], not [32, 2H]:
unit (i, r) holds the columns 16 i to 16 i + 15 of row r. Everything else is the same.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import NamedTuple

import torch

from quantkit_kernels.bits import pack_bits, unpack_bits
from quantkit_kernels.checks import check_part
from quantkit_kernels.stored import FLOATS, Spec, Stored

ROWS = 64  # of a chunk
HIGH_BITS = (2, 3, 6, 7, 0, 1, 4, 5)  # two fields of a half meet their third bits at once, in bits 2 and 6


class Geometry(NamedTuple):
    """How K is cut. `group` is 0 if there is one scale per row; `run` fields in a row share a group."""

    h: int
    fields: int  # of all planes of a chunk together
    planes: int
    chunk: int
    chunks: int
    group: int
    run: int
    groups: int


def geometry(bits: int, group_size: int, k: int) -> Geometry:
    """The cut of K for a scheme; group_size = K means one scale per row."""
    group = 0 if group_size == k else group_size
    if group % 32:
        raise ValueError(f"groups of {group_size} are not a multiple of 32")
    h, fields, planes = {4: (gcd(group, 64), 2, 1), 2: (gcd(group, 64), 4, 1), 3: (32, 8, 3)}.get(
        bits, (gcd(group, 128) or 128, 1, 1)
    )
    h = h or 64
    chunk = h * fields
    chunks = -(-k // chunk)
    run = gcd(group, chunk) // h if group else fields
    return Geometry(h, fields, planes, chunk, chunks, group, run, -(-chunks * chunk // group) if group else 1)


def _fields_to_planes(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (N', chunks, fields, H) to bytes (N', chunks, planes, H)."""
    if bits == 3:
        low, high = q & 3, q >> 2
        high = high[:, :, [HIGH_BITS.index(bit) for bit in range(8)]]
        planes = [_join(low[:, :, :4], 2), _join(low[:, :, 4:], 2), _join(high, 1)]
        return torch.stack(planes, 2)
    return _join(q, bits)[:, :, None]


def _planes_to_fields(planes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_fields_to_planes`."""
    if bits == 3:
        low = torch.cat([_cut(planes[:, :, 0], 2, 4), _cut(planes[:, :, 1], 2, 4)], 2)
        return low | _cut(planes[:, :, 2], 1, 8)[:, :, list(HIGH_BITS)] << 2
    width = bits if bits < 5 else 8
    return _cut(planes[:, :, 0], width, 8 // width)


def _join(q: torch.Tensor, width: int) -> torch.Tensor:
    out = q[:, :, 0].clone()
    for i in range(1, q.shape[2]):
        out |= q[:, :, i] << (width * i)
    return out


def _cut(byte: torch.Tensor, width: int, count: int) -> torch.Tensor:
    return torch.stack([(byte >> (width * i)) & (2**width - 1) for i in range(count)], 2)


def reads_by_row(device: torch.device) -> bool:
    """Whether a device's tensor cores take a row from each thread, as those of sm_100 do."""
    return (
        device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 10
    )


def to_fragments(planes: torch.Tensor, by_row: bool = False) -> torch.Tensor:
    """Bytes (N', chunks, planes, H) to (N'/64, chunks, planes, 32, 2H), by_row (N'/64, chunks, planes, H/16, 1024)."""
    n, chunks, count, h = planes.shape
    if by_row:
        t = planes.reshape(n // ROWS, ROWS, chunks, count, h // 16, 16)
        return t.permute(0, 2, 3, 4, 1, 5).reshape(n // ROWS, chunks, count, h // 16, ROWS * 16)
    # axes: block, 16 rows, row + 8 b, row c, chunk, plane, 32 columns, e, f, g, h
    t = planes.reshape(n // ROWS, 4, 2, 8, chunks, count, h // 32, 2, 2, 4, 2)
    return t.permute(0, 4, 5, 1, 3, 6, 9, 7, 8, 2, 10).reshape(n // ROWS, chunks, count, ROWS // 2, 2 * h)


def from_fragments(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_fragments`, of either kind."""
    blocks, chunks, count, _, h2 = codes.shape
    if is_by_row(codes):
        t = codes.reshape(blocks, chunks, count, -1, ROWS, 16).permute(0, 4, 1, 2, 3, 5)
        return t.reshape(blocks * ROWS, chunks, count, -1)
    t = codes.reshape(blocks, chunks, count, 4, 8, h2 // 64, 4, 2, 2, 2, 2)
    return t.permute(0, 3, 9, 4, 1, 2, 5, 7, 8, 6, 10).reshape(blocks * ROWS, chunks, count, h2 // 2)


def is_by_row(codes: torch.Tensor) -> bool:
    """Whether codes are in the order of `reads_by_row`."""
    return codes.shape[3] != ROWS // 2


def _columns(t: torch.Tensor, n: int, groups: int) -> torch.Tensor:
    """[N, K/G] to [N'/64, words, 64, groups per word], padded with 0."""
    each, blocks = 4 // t.element_size(), -(-n // ROWS)
    words = -(-groups // each)
    out = torch.zeros(words * each, blocks * ROWS, dtype=t.dtype, device=t.device)
    out[: t.shape[1], :n] = t.T
    return out.view(words, each, blocks, ROWS).permute(2, 0, 3, 1).contiguous()


def _rows(words: torch.Tensor, n: int, groups: int) -> torch.Tensor:
    """The inverse of `_columns`: [N, K/G]."""
    return words.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:n, :groups].contiguous()


def _codes(q: torch.Tensor, cut: Geometry, bits: int, by_row: bool) -> torch.Tensor:
    n, k = q.shape
    padded = torch.zeros(-(-n // ROWS) * ROWS, cut.chunks * cut.chunk, dtype=torch.uint8, device=q.device)
    padded[:n, :k] = q
    planes = _fields_to_planes(padded.view(len(padded), cut.chunks, cut.fields, cut.h), bits)
    return to_fragments(planes, by_row)


def build(stored: Stored, by_row: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes, scales, zeros) of a weight with codes that are integers or FP8."""
    spec, scale = stored.spec, stored.scale
    if spec.number == "fp8_e4m3":
        weight = unpack_bits(stored.packed, 8, spec.k).contiguous().view(torch.float8_e4m3fn)
        return *build_fp8(weight, scale, by_row), None
    if not spec.integers:
        raise ValueError(f"the Triton kernels take codes that are integers or FP8, not {spec.number}")
    cut = geometry(spec.bits, spec.group_size, spec.k)
    zeros = None
    if stored.zero_packed is not None:
        zero = unpack_bits(stored.zero_packed.T, spec.bits, spec.n).T.to(scale.dtype)
        zeros = _columns(zero, spec.n, cut.groups)
    codes = _codes(unpack_bits(stored.packed, spec.bits, spec.k), cut, spec.bits, by_row)
    return codes, _columns(scale, spec.n, cut.groups), zeros


def restore(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, spec: Spec) -> Stored:
    """The inverse of `build`, bit for bit."""
    if spec.number == "fp8_e4m3":
        weight, scale = restore_fp8(codes, scales, spec.group_size, spec.n, spec.k)
        return Stored(pack_bits(weight.view(torch.uint8), 8), scale, None, spec)
    check_weight(codes, scales, zeros, spec.bits, spec.group_size, spec.n, spec.k)
    if codes.dtype != torch.uint8 or spec.symmetric != (zeros is None):
        raise ValueError(
            f"a weight of integers has codes in uint8, and zeros unless it is symmetric, got {codes.dtype}, "
            f"zeros {None if zeros is None else zeros.dtype} and symmetric={spec.symmetric}"
        )
    q = _planes_to_fields(from_fragments(codes), spec.bits).flatten(1)[: spec.n, : spec.k]
    zero = None
    if zeros is not None:
        zero = pack_bits(_rows(zeros, spec.n, spec.groups).T.to(torch.uint8), spec.bits).T.contiguous()
    return Stored(pack_bits(q.contiguous(), spec.bits), _rows(scales, spec.n, spec.groups), zero, spec)


def check_weight(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
) -> None:
    """Raise ValueError unless these are the tensors of a weight [N, K]: kernels trust them, and would read beyond."""
    fp8 = codes.dtype == torch.float8_e4m3fn
    if codes.dtype != torch.uint8 and not (fp8 and bits == 8 and zeros is None):
        raise ValueError(
            f"codes are uint8, or float8_e4m3fn of 8 bits without zeros, got {codes.dtype}, {bits} bits"
        )
    if scales.dtype not in FLOATS:
        raise ValueError(f"scales are fp32, bf16 or fp16, got {scales.dtype}")
    by_row = codes.dim() == 5 and is_by_row(codes)
    of_codes, of_scales = shapes(bits, group_size, n, k, by_row, scales.element_size())
    what = f"of a {bits}-bit [{n}, {k}] weight"
    check_part(f"codes {what}", codes, of_codes, (codes.dtype,), codes.device)
    check_part(f"scales {what}", scales, of_scales, (scales.dtype,), codes.device)
    if zeros is not None:
        check_part(f"zeros {what}", zeros, of_scales, (scales.dtype,), codes.device)


@cache
def shapes(
    bits: int, group_size: int, n: int, k: int, by_row: bool, scale_bytes: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of codes and of scales (and zeros) of a weight [N, K]; ValueError if the kernels do not take it."""
    Spec.integer(bits, group_size, True, n, k)
    cut = geometry(bits, group_size, k)
    blocks, each = -(-n // ROWS), 4 // scale_bytes
    unit = (cut.h // 16, 16 * ROWS) if by_row else (ROWS // 2, 2 * cut.h)
    return (blocks, cut.chunks, cut.planes, *unit), (blocks, -(-cut.groups // each), ROWS, each)


def build_fp8(
    weight: torch.Tensor, scale: torch.Tensor, by_row: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) from float8_e4m3fn [N, K] and scale [N, K/G]. Codes of NaN are refused."""
    if weight.dtype != torch.float8_e4m3fn or weight.dim() != 2:
        raise ValueError(f"weight must be float8_e4m3fn [N, K], got {weight.dtype} {list(weight.shape)}")
    n, k = weight.shape
    groups = scale.shape[-1] if scale.dim() else 0
    if scale.shape != (n, groups) or not groups or k % groups or scale.dtype not in FLOATS:
        raise ValueError(
            f"scale of a weight [{n}, {k}] must be fp32, bf16 or fp16 [{n}, K/G], got {scale.dtype} "
            f"{list(scale.shape)}"
        )
    if scale.device != weight.device:
        raise ValueError(f"scale is on {scale.device}, weight on {weight.device}; move them to one device")
    cut = geometry(8, k // groups, k)
    raw = weight.view(torch.uint8)
    if bool((raw & 0x7F == 0x7F).any()):
        raise ValueError("FP8 weights contain NaN")
    return _codes(raw, cut, 8, by_row).view(torch.float8_e4m3fn), _columns(scale, n, cut.groups)


def restore_fp8(
    codes: torch.Tensor, scales: torch.Tensor, group_size: int, n: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `build_fp8`: (weight [N, K], scale [N, K/G])."""
    check_weight(codes, scales, None, 8, group_size, n, k)
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"codes of an FP8 weight must be float8_e4m3fn, got {codes.dtype}")
    q = from_fragments(codes.view(torch.uint8)).flatten(1)[:n, :k]
    return q.contiguous().view(torch.float8_e4m3fn), _rows(scales, n, k // group_size)
