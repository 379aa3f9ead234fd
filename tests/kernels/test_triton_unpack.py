"""The inline assembly, executed by a small PTX machine: the interpreter cannot run it, and a GPU may not be at hand."""

import re

import pytest
import torch
from quantkit_kernels.triton.layout import HIGH_BITS
from quantkit_kernels.triton.unpack import bases, blocks, pair

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MASK = 0xFFFFFFFF


def halves(word: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.uint16).view(dtype)


def fma(a: int, b: int, c: int, dtype: torch.dtype) -> int:
    exact = halves(a, dtype).double() * halves(b, dtype).double() + halves(c, dtype).double()
    low, high = exact.to(dtype).view(torch.uint16).tolist()
    return high << 16 | low


def prmt(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    rows = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8)]
    out = 0
    for i, row in enumerate(rows):
        out |= row if table >> i & 1 else 0
    return out & MASK


OPS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "shr": lambda a, n: a >> n,
    "shl": lambda a, n: a << n & MASK,
}


def execute(block: tuple[str, str], inputs: list[int]) -> list[int]:
    """The output registers of a block; reading a register before it is written is a KeyError."""
    text, constraints = block
    outputs = constraints.split(",").count("=&r")
    registers = {f"${outputs + i}": word for i, word in enumerate(inputs)}
    assert len(constraints.split(",")) == outputs + len(inputs)
    for statement in re.findall(r"([a-z][^;{}]*);", text):
        name, rest = statement.strip().split(" ", 1)
        if name == "reg":
            continue
        target, *operands = (o.strip() for o in rest.split(","))
        values = [int(o, 0) if o[0].isdigit() else registers[o] for o in operands]
        name = name.split(".", 1)
        if name[0] == "fma":
            registers[target] = fma(*values, DTYPES["bf16" if name[1] == "rn.bf16x2" else "fp16"])
        else:
            registers[target] = (OPS | {"prmt": prmt, "lop3": lop3})[name[0]](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def word(values: list[int]) -> int:
    return int.from_bytes(bytes(values), "little")


@pytest.mark.parametrize("kind", list(DTYPES))
@pytest.mark.parametrize(
    ("bits", "step"), [(4, 2), (4, 1), (2, 4), (2, 2), (2, 1), (3, 4), (3, 2), (3, 1), (8, 1)]
)
@pytest.mark.parametrize("zero", ["middle", "own"])
def test_every_code_is_unpacked_exactly(kind, bits, step, zero):
    width = {3: 2}.get(bits, bits)
    middle = 2 ** (bits - 1) if zero == "middle" else None
    dtype = DTYPES[kind]
    found = blocks(bits, kind, middle, step)
    assert len(found) * step == {2: 4, 3: 8, 4: 2, 8: 1}[bits]
    for first in range(0, 256, 4):
        codes = [(first + i) * 7 % 256 for i in range(4)]
        high = [(first + i) * 11 % 256 for i in range(4)]
        z = [middle] * 4 if middle is not None else [(first * 5 + 3 * i) % 2**bits for i in range(4)]
        inputs = [word(codes)] + ([word(high)] if bits == 3 else [])
        if middle is None:
            for base in bases(bits, kind):
                less = [pair(-(base + v), kind) & 0xFFFF for v in z]
                inputs += [less[1] << 16 | less[0], less[3] << 16 | less[2]]
        for i, block in enumerate(found):
            out = execute(block, inputs)
            for j in range(step):
                f = i * step + j
                values = torch.cat([halves(r, dtype) for r in out[2 * j : 2 * j + 2]])
                q = [c >> (width * f % 8) & (2**width - 1) for c in codes]
                if bits == 3:
                    q = [low | (h >> HIGH_BITS[f] & 1) << 2 for low, h in zip(q, high, strict=True)]
                assert values.tolist() == [a - b for a, b in zip(q, z, strict=True)]


@pytest.mark.parametrize("kind", list(DTYPES))
def test_every_fp8_value_is_decoded_exactly(kind):
    (block,) = blocks(8, kind, 128, 1, fp8=True)
    for first in range(0, 256, 4):
        codes = torch.arange(first, first + 4).to(torch.uint8)
        codes[codes & 127 == 127] = 0x80  # no NaN; -0.0 instead
        values = torch.cat([halves(r, DTYPES[kind]) for r in execute(block, [word(codes.tolist())])])
        truth = codes.view(torch.float8_e4m3fn).to(DTYPES[kind])
        assert torch.equal(values.view(torch.int16), truth.view(torch.int16))  # bit by bit: -0.0 is -0.0
