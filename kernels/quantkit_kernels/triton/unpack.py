"""PTX that turns four bytes of codes into pairs of bf16 or fp16, without integer-to-float conversions.

Bits below a float's mantissa are its value: 0x4300 | q is the bf16 128 + q for q < 128, 0x6400 | q the fp16 1024 + q
for q < 1024. One fused multiply-add per pair takes off 128 + z (or 1024 + z), exactly. Per weight: 4 bits 1.5
instructions, 2 bits 1.5, 3 bits 2.6, 8 bits 2 (bf16) or 1 (fp16), FP8 2.5.

Which four elements of a tile meet in one block is the compiler's choice, so every output depends on its own byte
(and its own zero point) only.
"""

from __future__ import annotations

import struct

FLOATS = {  # magic number, the integer it stands for, fma
    "bf16": (0x43004300, 128, "fma.rn.bf16x2"),
    "fp16": (0x64006400, 1024, "fma.rn.f16x2"),
}
_AND_OR, _AND_XOR = "0xEA", "0x6A"  # truth tables of (a & b) | c and (a & b) ^ c


def pair(value: float, kind: str) -> int:
    """Two copies of a value as one register; the value must be exact in `kind`."""
    half = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    if kind == "fp16":
        half = struct.unpack("<H", struct.pack("<e", value))[0]
    return half << 16 | half


def base(bits: int, kind: str) -> int:
    """What the codes carry before the last addition, -(base + z)."""
    return -128 if bits > 4 and kind == "bf16" else FLOATS[kind][1]


def blocks(
    bits: int, kind: str, zero: int | None, step: int, fp8: bool = False
) -> tuple[tuple[str, str], ...]:
    """(assembly, constraints) for each `step` fields of a chunk, for `tl.inline_asm_elementwise(..., pack=4)`.

    bits: 2, 3, 4 or 8. Inputs: 4 codes; 3 bits: 4 bytes of high bits; zero None: 4 floats -(base + z). Outputs: a
    float tensor per field, q - z exactly (FP8: the value).
    """
    fields = {2: 4, 3: 8, 4: 2, 8: 1}[bits]
    return tuple(_block(bits, kind, zero, range(f, f + step), fp8) for f in range(0, fields, step))


def _block(bits: int, kind: str, zero: int | None, fields: range, fp8: bool) -> tuple[str, str]:
    outputs, inputs = 2 * len(fields), 1 + (bits == 3) + 2 * (zero is None)
    codes, high = f"${outputs}", f"${outputs + 1}"
    magic, _, fma = FLOATS[kind]
    constants = {"one": pair(1.0, kind)}
    if fp8:
        shift, mask, power = (4, 0x07F007F0, 120) if kind == "bf16" else (1, 0x3F803F80, 8)
        constants = {
            "scale": pair(2.0**power, kind),
            "nothing": 0x80008000,
        }  # x + -0.0 is x, also if x is -0.0
    elif zero is not None:
        constants["less"] = pair(-(base(bits, kind) + zero), kind)
    lines = []
    for p in (
        0,
        1,
    ):  # the first and the second two bytes, each in the low byte of 16 bits (FP8: the high byte)
        less = f"${outputs + inputs - 2 + p}" if zero is None else "less"
        lines.append(
            f"prmt.b32 w, {codes}, 0, {('0x1404', '0x3424')[p] if fp8 else ('0x4140', '0x4342')[p]};"
        )
        if fp8:  # sign, then exponent and mantissa moved to the float's place: the value / 2^power
            lines += [
                f"shr.b32 t, w, {shift};",
                "and.b32 u, w, 0x80008000;",
                f"lop3.b32 t, t, {mask:#x}, u, {_AND_OR};",
                f"{fma} ${p}, t, scale, nothing;",
            ]
        elif bits == 8 and kind == "bf16":  # seven bits, less 128 or 256 by the eighth: q - 128
            lines += [
                f"lop3.b32 t, w, 0x007F007F, {magic:#x}, {_AND_OR};",
                f"lop3.b32 u, w, 0x00800080, 0xC380C380, {_AND_XOR};",
                f"{fma} ${p}, t, one, u;",
            ]
            if zero != 128:
                lines.append(f"{fma} ${p}, ${p}, one, {less};")
        else:
            if bits == 3:
                lines.append(f"prmt.b32 h, {high}, 0, {('0x4140', '0x4342')[p]};")
            for i, f in enumerate(fields):
                width = {3: 2}.get(bits, bits)
                place = width * f % 8
                if place:
                    lines.append(f"shr.b32 t, w, {place};")
                mask = 0x00010001 * (2**width - 1)
                lines.append(f"lop3.b32 t, {'t' if place else 'w'}, {mask:#x}, {magic:#x}, {_AND_OR};")
                if bits == 3:
                    lines.append(f"shr.b32 u, h, {f - 2};" if f > 1 else f"shl.b32 u, h, {2 - f};")
                    lines.append(f"lop3.b32 t, u, 0x00040004, t, {_AND_OR};")
                lines.append(f"{fma} ${2 * i + p}, t, one, {less};")
    head = [".reg .b32 w, h, t, u;"]
    for name, value in constants.items():
        head.append(f".reg .b32 {name};\nmov.b32 {name}, {value:#x};")
    text = "\n".join(["{", *head, *lines, "}"])
    return text, ",".join(["=&r"] * outputs + ["r"] * inputs)
