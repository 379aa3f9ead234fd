"""The storage of the native kernels, and its conversion from and to the canonical tensors (`../stored.py`).

`layout.cpp` describes the bytes: units of 16 rows x C columns, each with its scales and zero points.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from quantkit_kernels.bits import pack_bits, words
from quantkit_kernels.cpu import library
from quantkit_kernels.stored import TABLES, InputRange, Layout, Spec, Stored

BITS = (2, 3, 4, 8)
TABLE_NUMBERS = {"nf4": 1, "fp8_e4m3": 2, "fp4_e2m1": 3}  # qk::Table; 0 for integers
F16, F32, F8 = range(3)  # qk::ScaleType


class Packed(NamedTuple):
    """A weight [N, K] in the native layout. scale_factor multiplies every stored scale, which is of `scale_type`.

    inputs: the stored range of its inputs for computes "int8-range" and "fp8-range"; None: each token has its own.
    divisor: that of its `Stored`; scale_factor is then one over it, if the scales are kept as FP8.
    """

    units: torch.Tensor  # uint8 [B]
    spec: Spec
    scale_factor: float
    scale_type: int
    scale_dtype: torch.dtype
    inputs: InputRange | None = None
    divisor: float | None = None

    @property
    def table(self) -> int:
        """`qk::Table` of the codes."""
        return table_number(self.spec)

    def weight(self, bias: torch.Tensor | None = None) -> library.Weight:
        """The C struct; it points into `units` and `bias` (fp32 [N]), which must outlive it."""
        check_units(self.units, self.spec, self.scale_type)
        if bias is not None:
            check_bias(bias, self.spec.n)
        spec = self.spec
        return library.Weight(
            self.units.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self.scale_factor,
            spec.n,
            spec.k,
            spec.group_size,
            spec.bits,
            self.scale_type,
            self.table,
            *(self.inputs or ()),
        )


def layout_of(packed: Packed) -> Layout:
    """A packed weight as a layout: the tensor `units` and five facts."""
    names = ("scale_factor", "scale_type", "scale_dtype", "inputs", "divisor")
    facts = {name: getattr(packed, name) for name in names}
    return Layout({"units": packed.units}, packed.spec, facts)


def packed_of(layout: Layout) -> Packed:
    """The inverse of `layout_of`."""
    return Packed(layout.tensors["units"], layout.spec, **layout.facts)


def table_number(spec: Spec) -> int:
    """`qk::Table` of a number: 0 for integers."""
    return TABLE_NUMBERS.get(spec.number, 0)


def refuses(spec: Spec) -> str | None:
    """Why the native kernels cannot run these bits and groups, or None."""
    if spec.bits not in BITS:
        return f"the native kernels take 2, 3, 4 and 8 bits, not {spec.bits}"
    small, size = (16, 32, 64) if spec.number == "fp4_e2m1" else (32, 64), spec.group_size
    if size != spec.k and size not in small and size % 128:
        groups = ", ".join(map(str, small))
        return f"the native kernels take groups of {groups}, multiples of 128 or whole rows, not {size}"
    return None


def pack(stored: Stored) -> Packed:
    """The native layout of a weight on the CPU; ValueError if the kernels do not take it."""
    spec = stored.spec
    reason = refuses(spec)
    if reason:
        raise ValueError(reason)
    if stored.device.type != "cpu":
        raise ValueError(f"the native layout is built on the CPU, the weight is on {stored.device}")
    divisor = None if stored.divisor is None else float(stored.divisor)
    factor, kind, scale = _storage(spec, stored.scale.float(), divisor)
    units = torch.empty(units_bytes(spec, kind), dtype=torch.uint8)
    out = Packed(units, spec, factor, kind, stored.scale.dtype, stored.inputs, divisor)
    c, weight = library.required(), out.weight()
    if c.qk_weight_bytes(weight) != units.numel():
        raise ValueError(f"the native kernels take no weight of {spec.bits} bits [{spec.n}, {spec.k}]")
    packed, scale = stored.packed.contiguous(), scale.contiguous()
    zero = None if stored.zero_packed is None else stored.zero_packed.contiguous()
    zeros = None if zero is None else zero.data_ptr()
    c.qk_pack(weight, units.data_ptr(), packed.data_ptr(), scale.data_ptr(), zeros)
    return out


def pack_codes(codes: torch.Tensor, scale: torch.Tensor, table: str) -> Packed:
    """Weights stored by table: codes uint8 [N, K], scale [N, K/G]; w = table[code] * scale, exactly as stored.

    table: "nf4", codes 0 to 15 in the order of QLoRA (Dettmers et al. 2023, appendix E); "fp8_e4m3", codes the bytes
    of a float8_e4m3fn tensor (`.view(torch.uint8)`); or "fp4_e2m1", codes sign, exponent, mantissa in four bits.
    """
    if codes.dim() != 2 or scale.dim() != 2 or len(scale) != len(codes) or scale.shape[1] == 0:
        raise ValueError(
            f"codes are [N, K] and scale [N, K/G], got {list(codes.shape)} and {list(scale.shape)}"
        )
    n, k = codes.shape
    if k % scale.shape[1]:
        raise ValueError(f"{k} columns do not divide into {scale.shape[1]} groups")
    bits = TABLES.get(table)
    if bits is None:
        raise ValueError(f"unknown table {table!r}; known: {', '.join(TABLES)}")
    spec = Spec(table, bits, k // scale.shape[1], True, n, k)
    return pack(Stored(pack_bits(codes, bits), scale, None, spec))


def unpack(weight: Packed) -> Stored:
    """What `pack` was given, bit for bit."""
    spec = weight.spec
    packed = torch.empty(spec.n, words(spec.k, spec.bits), dtype=torch.int32)
    scale = torch.empty(spec.n, spec.groups)
    zero = None if spec.symmetric else torch.empty(words(spec.n, spec.bits), spec.groups, dtype=torch.int32)
    library.required().qk_unpack(
        weight.weight(), packed.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr()
    )
    kept, whole = weight.divisor if weight.scale_type == F8 else None, weight.divisor
    scale = scale * weight.scale_factor if kept is None else scale / kept
    divisor = None if whole is None else torch.tensor([whole])
    return Stored(packed, scale.to(weight.scale_dtype), zero, spec, weight.inputs, divisor)


def _storage(spec: Spec, scale: torch.Tensor, divisor: float | None) -> tuple[float, int, torch.Tensor]:
    """(factor, type, scales divided by factor): the smallest type in which fp32 scales are exact.

    FP4 in groups of 16 and 32 may have FP8 scales, divided by `divisor` or times a power of two; other scales are fp16
    times a power of two, or fp32.
    """
    most = float(scale.abs().max()) if scale.numel() else 0.0
    exponent = 0 if most == 0 or not math.isfinite(most) else math.frexp(most)[1]
    if _scales_side_by_side(spec):
        factor = 2.0 ** (exponent - 8)  # the largest is below 256
        wanted = scale / factor if divisor is None else scale * divisor
        codes = wanted.to(torch.float8_e4m3fn).float()
        exact = torch.equal(codes * factor if divisor is None else codes / divisor, scale)
        if exact and not codes.signbit().any():
            return factor if divisor is None else 1 / divisor, F8, codes
    for factor in (1.0, 2.0 ** (exponent - 15)):
        if torch.equal((scale / factor).half().float() * factor, scale):
            return factor, F16, scale / factor
    return 1.0, F32, scale


def _scales_side_by_side(spec: Spec) -> bool:
    """Whether a unit has the scales of several groups (`qk::parts`)."""
    return spec.number == "fp4_e2m1" and spec.group_size in (16, 32) and spec.group_size != spec.k


@functools.cache
def units_bytes(spec: Spec, scale_type: int) -> int:
    """Bytes of the units of a weight [N, K]: 16 rows x C columns each, and their scales."""
    size, channel = spec.group_size, spec.group_size == spec.k
    parts = (4 if scale_type == F8 else 2) if _scales_side_by_side(spec) else 1
    columns = 128 if channel or size % 128 == 0 else size * parts
    units, scales = -(-spec.k // columns), 128 if scale_type == F32 else 64
    return -(-spec.n // 16) * (units * columns * spec.bits * 2 + (1 if channel else units) * scales)


def check_units(units: torch.Tensor, spec: Spec, scale_type: int, device: str = "cpu") -> None:
    """Raise ValueError unless these are the bytes of a weight `spec`, by default in CPU memory."""
    reason = refuses(spec)
    if reason:
        raise ValueError(reason)
    if scale_type not in (F16, F32) and not (scale_type == F8 and _scales_side_by_side(spec)):
        raise ValueError(
            f"unknown type of scales {scale_type}; known: 0 (fp16), 1 (fp32), 2 (fp8, of small groups)"
        )
    size = units_bytes(spec, scale_type)
    fits = units.numel() == size and units.dtype == torch.uint8 and units.is_contiguous()
    if not fits or units.device.type != device:
        raise ValueError(
            f"units of a {spec.bits}-bit [{spec.n}, {spec.k}] weight are contiguous uint8 [{size}] on {device}, got "
            f"{units.dtype} {list(units.shape)} on {units.device}"
        )


def check_bias(bias: torch.Tensor, n: int, device: str = "cpu") -> None:
    """Raise ValueError unless the native code can read this bias."""
    fits = bias.shape == (n,) and bias.dtype == torch.float32 and bias.is_contiguous()
    if not fits or bias.device.type != device:
        raise ValueError(
            f"bias must be contiguous fp32 [{n}] on {device}, got {bias.dtype} {list(bias.shape)} on {bias.device}"
        )
