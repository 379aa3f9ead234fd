"""PTX that turns four bytes of codes into pairs of bf16 or fp16, without integer-to-float conversions.

Bits below a float's mantissa are its value: 0x4300 | q is the bf16 128 + q for q < 128, 0x6400 | q the fp16 1024 + q
for q < 1024. Bits that lie higher in the mantissa need no shift but a smaller magic number: 0x4200 | q << 2 is 32 + q.
One fused multiply-add per pair takes off the base + z, exactly. Instructions per weight, bf16 and fp16: 4 bits 1.5 and
1.25, 2 bits 1.25 and 1.13, 3 bits 1.9 and 1.8, 8 bits 2 and 1, FP8 2.5.

Which four elements of a tile meet in one block is the compiler's choice, so every output depends on its own byte
(and its own zero point) only.
"""

from __future__ import annotations

import struct

from quantkit_kernels.triton.layout import HIGH_BITS

FIELDS = {2: 4, 3: 8, 4: 2, 8: 1}  # of a byte; with 3 bits of a byte of each of the three planes
MANTISSA = {"bf16": 7, "fp16": 10}
FMA = {"bf16": "fma.rn.bf16x2", "fp16": "fma.rn.f16x2"}
_AND_OR, _AND_XOR, _SELECT = "0xEA", "0x6A", "0xE2"  # (a & b) | c, (a & b) ^ c, b ? a : c, bit by bit


def pair(value: float, kind: str) -> int:
    """Two copies of a value as one register; the value must be exact in `kind`."""
    half: int = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    if kind == "fp16":
        half = struct.unpack("<H", struct.pack("<e", value))[0]
    return half << 16 | half


def _place(bits: int, kind: str, f: int) -> tuple[int, int, int]:
    """Field f of a byte: (shift to the right, lowest bit after it, base). Shifted only if it is beyond the mantissa."""
    low, width = (4 * (f // 2 % 2), 3) if bits == 3 else (bits * f % 8, bits)
    shift = low if low + width > MANTISSA[kind] else 0
    return shift, low - shift, 1 << (MANTISSA[kind] - low + shift)


def bases(bits: int, kind: str) -> tuple[int, ...]:
    """What the codes carry before the last addition of -(base + z): every base that the fields of a byte have."""
    if bits > 4 and kind == "bf16":
        return (-128,)
    return tuple(dict.fromkeys(_place(bits, kind, f)[2] for f in range(FIELDS[bits])))


def blocks(
    bits: int, kind: str, zero: int | None, step: int, fp8: bool = False
) -> tuple[tuple[str, str], ...]:
    """(assembly, constraints) for each `step` fields of a chunk, for `tl.inline_asm_elementwise(..., pack=4)`.

    bits: 2, 3, 4 or 8. Inputs: 4 codes; 3 bits: 4 bytes of high bits; zero None: for each of `bases` 4 floats
    -(base + z). Outputs: a float tensor per field, q - z exactly (FP8: the value).
    """
    return tuple(_block(bits, kind, zero, range(f, f + step), fp8) for f in range(0, FIELDS[bits], step))


def _block(bits: int, kind: str, zero: int | None, fields: range, fp8: bool) -> tuple[str, str]:
    every = (0,) if fp8 else bases(bits, kind)
    outputs, inputs = 2 * len(fields), 1 + (bits == 3) + (2 * len(every) if zero is None else 0)
    constants = {"one": pair(1.0, kind)}
    if fp8:
        constants = {
            "scale": pair(2.0 ** (120 if kind == "bf16" else 8), kind),
            "nothing": 0x80008000,
        }  # x + -0.0 is x
    elif zero is not None:
        constants |= {f"less{i}": pair(-(base + zero), kind) for i, base in enumerate(every)}
    lines = []
    for p in (
        0,
        1,
    ):  # the first and the second two bytes, each in the low byte of 16 bits (FP8: the high byte)
        spread = ("0x1404", "0x3424")[p] if fp8 else ("0x4140", "0x4342")[p]
        lines.append(f"prmt.b32 w, ${outputs}, 0, {spread};")
        less = [f"less{i}" for i in range(len(every))]
        if zero is None:
            less = [f"${outputs + 1 + (bits == 3) + 2 * i + p}" for i in range(len(every))]
        if fp8:
            lines += _fp8(kind, p)
        elif bits == 8 and kind == "bf16":
            lines += _bf16_bytes(p, less[0] if zero != 128 else None)
        else:
            if bits == 3:
                lines.append(f"prmt.b32 h, ${outputs + 1}, 0, {spread};")
            lines += _fields(bits, kind, fields, p, dict(zip(every, less, strict=True)))
    head = [".reg .b32 w, h, t, u, v0, v1;"]
    for name, value in constants.items():
        head.append(f".reg .b32 {name};\nmov.b32 {name}, {value:#x};")
    text = "\n".join(["{", *head, *lines, "}"])
    return text, ",".join(["=&r"] * outputs + ["r"] * inputs)


def _fp8(kind: str, p: int) -> list[str]:
    """Sign, then exponent and mantissa moved to the float's place: the value / 2^power."""
    shift, mask = (4, 0x07F007F0) if kind == "bf16" else (1, 0x3F803F80)
    return [
        f"shr.b32 t, w, {shift};",
        "and.b32 u, w, 0x80008000;",
        f"lop3.b32 t, t, {mask:#x}, u, {_AND_OR};",
        f"{FMA[kind]} ${p}, t, scale, nothing;",
    ]


def _bf16_bytes(p: int, less: str | None) -> list[str]:
    """Seven bits, less 128 or 256 by the eighth: q - 128; then less z - 128."""
    lines = [
        f"lop3.b32 t, w, 0x007F007F, 0x43004300, {_AND_OR};",
        f"lop3.b32 u, w, 0x00800080, 0xC380C380, {_AND_XOR};",
        f"{FMA['bf16']} ${p}, t, one, u;",
    ]
    return lines if less is None else [*lines, f"{FMA['bf16']} ${p}, ${p}, one, {less};"]


def _fields(bits: int, kind: str, fields: range, p: int, less: dict[int, str]) -> list[str]:
    """Fields of the bytes in w; the third bits of 3 are in h. less: the register to add for a base."""
    lines = []
    for i, f in enumerate(fields):
        source = "w"
        if bits == 3:
            source = f"v{f % 2}"
            if f % 4 < 2 or f - 2 not in fields:
                lines += _join(f, source)
        shift, low, base = _place(bits, kind, f)
        if shift:
            lines.append(f"shr.b32 t, {source}, {shift};")
        mask = 0x00010001 * (((1 << bits) - 1) << low)
        word = "t" if shift else source
        lines.append(f"lop3.b32 t, {word}, {mask:#x}, {pair(base, kind):#x}, {_AND_OR};")
        lines.append(f"{FMA[kind]} ${2 * i + p}, t, one, {less[base]};")
    return lines


def _join(f: int, target: str) -> list[str]:
    """Two fields of 3 bits, the even or the odd ones of a half, in bits 0-2 and 4-6 of `target`."""
    odd, move = f % 2, HIGH_BITS[f - 2 if f % 4 > 1 else f] - 2
    lines = ["shr.b32 t, w, 2;"] if odd else []
    if move:
        lines.append(f"{'shr' if move > 0 else 'shl'}.b32 u, h, {abs(move)};")
    low, high = "t" if odd else "w", "u" if move else "h"
    return [*lines, f"lop3.b32 {target}, {low}, 0x00330033, {high}, {_SELECT};"]
