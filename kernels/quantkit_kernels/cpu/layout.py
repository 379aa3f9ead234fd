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
from quantkit_kernels.stored import TABLES, InputRange, Spec, Stored

BITS = (2, 3, 4, 8)
TABLE_NUMBERS = {"nf4": 1, "fp8_e4m3": 2}  # qk::Table; 0 for integers


class Packed(NamedTuple):
    """A weight [N, K] in the native layout. scale_factor multiplies every stored scale.

    inputs: the stored range of its inputs for compute "int8-range"; None: each token has its own.
    """

    units: torch.Tensor  # uint8 [B]
    spec: Spec
    scale_factor: float
    wide_scales: bool
    scale_dtype: torch.dtype
    inputs: InputRange | None = None

    @property
    def table(self) -> int:
        """`qk::Table` of the codes."""
        return table_number(self.spec)

    def weight(self, bias: torch.Tensor | None = None) -> library.Weight:
        """The C struct; it points into `units` and `bias` (fp32 [N]), which must outlive it."""
        check_units(self.units, self.spec, self.wide_scales)
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
            self.wide_scales,
            self.table,
            *(self.inputs or ()),
        )


def table_number(spec: Spec) -> int:
    """`qk::Table` of a number: 0 for integers."""
    return TABLE_NUMBERS.get(spec.number, 0)


def refuses(bits: int, group_size: int, k: int) -> str | None:
    """Why the native kernels cannot run these bits and groups, or None."""
    if bits not in BITS:
        return f"the native kernels take 2, 3, 4 and 8 bits, not {bits}"
    if group_size != k and group_size not in (32, 64) and group_size % 128:
        return f"the native kernels take groups of 32, 64, multiples of 128 or whole rows, not {group_size}"
    return None


def pack(stored: Stored) -> Packed:
    """The native layout of a weight on the CPU; ValueError if the kernels do not take it."""
    spec = stored.spec
    reason = refuses(spec.bits, spec.group_size, spec.k)
    if reason:
        raise ValueError(reason)
    if stored.device.type != "cpu":
        raise ValueError(f"the native layout is built on the CPU, the weight is on {stored.device}")
    factor, wide = _storage(stored.scale)
    units = torch.empty(units_bytes(spec.bits, spec.group_size, spec.n, spec.k, wide), dtype=torch.uint8)
    out = Packed(units, spec, factor, wide, stored.scale.dtype, stored.inputs)
    c, weight = library.required(), out.weight()
    if c.qk_weight_bytes(weight) != units.numel():
        raise ValueError(f"the native kernels take no weight of {spec.bits} bits [{spec.n}, {spec.k}]")
    packed, scale = stored.packed.contiguous(), (stored.scale.float() / factor).contiguous()
    zero = None if stored.zero_packed is None else stored.zero_packed.contiguous()
    zeros = None if zero is None else zero.data_ptr()
    c.qk_pack(weight, units.data_ptr(), packed.data_ptr(), scale.data_ptr(), zeros)
    return out


def pack_codes(codes: torch.Tensor, scale: torch.Tensor, table: str) -> Packed:
    """Weights stored by table: codes uint8 [N, K], scale [N, K/G]; w = table[code] * scale, exactly as stored.

    table: "nf4", codes 0 to 15 in the order of QLoRA (Dettmers et al. 2023, appendix E), or "fp8_e4m3", codes the bytes
    of a float8_e4m3fn tensor (`.view(torch.uint8)`).
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
    return Stored(packed, (scale * weight.scale_factor).to(weight.scale_dtype), zero, spec, weight.inputs)


def _storage(scale: torch.Tensor) -> tuple[float, bool]:
    """(factor, wide): a power of two that makes all scales exact in fp16; wide: there is none, so scales are fp32."""
    scale = scale.float()
    most = float(scale.abs().max()) if scale.numel() else 0.0
    factor = 1.0 if most == 0 or not math.isfinite(most) else 2.0 ** (math.frexp(most)[1] - 15)
    for candidate in (1.0, factor):
        if torch.equal((scale / candidate).half().float() * candidate, scale):
            return candidate, False
    return 1.0, True


@functools.cache
def units_bytes(bits: int, group_size: int, n: int, k: int, wide_scales: bool) -> int:
    """Bytes of the units of a weight [N, K]: 16 rows x C columns each, and their scales."""
    columns = 128 if group_size == k or group_size % 128 == 0 else group_size
    units, scales = -(-k // columns), 128 if wide_scales else 64
    return -(-n // 16) * (units * columns * bits * 2 + (1 if group_size == k else units) * scales)


def check_units(units: torch.Tensor, spec: Spec, wide_scales: bool, device: str = "cpu") -> None:
    """Raise ValueError unless these are the bytes of a weight `spec`, by default in CPU memory."""
    reason = refuses(spec.bits, spec.group_size, spec.k)
    if reason:
        raise ValueError(reason)
    size = units_bytes(spec.bits, spec.group_size, spec.n, spec.k, wide_scales)
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
