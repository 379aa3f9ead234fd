"""`Spec` and `Stored`: one packed weight as every backend takes it, whatever file it came from.

    packed       int32 [N, ceil(K bits / 32)]     the codes of a row as one bit string (`bits.py`)
    scale        fp32, bf16 or fp16 [N, K/G]
    divisor      fp32 [1]; None: the scales are what they are. Else each is an FP8 E4M3 number divided by it (NVFP4)
    zero_packed  int32 [ceil(N bits / 32), K/G]   zero points, packed along N; None: every zero point is 2^(bits-1)

    w = (q - z) * s

Both values check themselves when they are made, so that native code, which trusts sizes, is only given sizes that
are right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from quantkit_kernels.bits import words

TABLES = {"nf4": 4, "fp8_e4m3": 8, "fp4_e2m1": 4}  # numbers whose codes index a table, and their bits
INPUTS = ("float", "int8", "int8-token", "int8-range", "fp8-range", "fp8-group")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Spec:
    """What a weight [N, K] is: its number format, its grid and how its inputs are multiplied. No tensors.

    number: "int2" to "int8", or a key of TABLES, whose codes index a table. group_size: columns that share a
    scale, K if a row has one scale. symmetric: there are no stored zero points. inputs: "float", the activations as
    they are; "int8", rounded to int8 with one scale per token and group of columns; "int8-token", with one scale per
    token; "int8-range", as a checkpoint with quantized inputs means it (compressed-tensors): q = rne(x / s + z) within
    -128..127, s and z those of `Stored.inputs` or, without it, s = max|x| / 127.5 of the token and z = 0; "fp8-range",
    the same in FP8 E4M3: e4m3(x / s) s, s that of `Stored.inputs` or max|x| / 448 of the token; "fp8-group", with
    s = max|x| / 448 of the token and 128 columns.
    """

    number: str
    bits: int
    group_size: int
    symmetric: bool
    n: int
    k: int
    inputs: str = "float"

    def __post_init__(self) -> None:
        known = {f"int{bits}": bits for bits in range(2, 9)} | TABLES
        if known.get(self.number) != self.bits:
            raise ValueError(f"no number {self.number!r} of {self.bits} bits; known: {', '.join(known)}")
        if self.number in TABLES and not self.symmetric:
            raise ValueError(f"codes of {self.number} have no zero points; use symmetric=True")
        if self.n < 1 or self.k < 1:
            raise ValueError(f"a weight has at least one row and one column, got [{self.n}, {self.k}]")
        if self.group_size < 1 or self.k % self.group_size:
            raise ValueError(f"groups of {self.group_size} columns do not divide a row of {self.k}")
        if self.inputs not in INPUTS:
            raise ValueError(f"unknown compute {self.inputs!r}; known: {', '.join(INPUTS)}")

    @classmethod
    def integer(
        cls, bits: int, group_size: int | None, symmetric: bool, n: int, k: int, inputs: str = "float"
    ) -> Spec:
        """Integer codes; group_size None: one scale per row."""
        return cls(f"int{bits}", bits, group_size or k, symmetric, n, k, inputs)

    @property
    def integers(self) -> bool:
        """Whether codes are numbers, (q - z) * s; else they index a table."""
        return self.number not in TABLES

    @property
    def groups(self) -> int:
        """Scales per row."""
        return self.k // self.group_size

    def with_inputs(self, inputs: str) -> Spec:
        """The same weight, multiplied another way."""
        return replace(self, inputs=inputs)

    def with_rows(self, n: int) -> Spec:
        """A weight of the same kind with other rows."""
        return replace(self, n=n)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of a `Stored`, by its name."""
        shapes: dict[str, tuple[int, ...]] = {
            "packed": (self.n, words(self.k, self.bits)),
            "scale": (self.n, self.groups),
            "divisor": (1,),
        }
        return shapes if self.symmetric else shapes | {"zero_packed": (words(self.n, self.bits), self.groups)}


class InputRange(NamedTuple):
    """The stored range of a weight's inputs: x = (q - zero) * scale, with q an int8 or, zero being 0, an FP8 E4M3."""

    scale: float
    zero: int = 0

    def check(self) -> None:
        """ValueError for what is no range."""
        if not (0 < self.scale < math.inf and -128 <= self.zero <= 127):
            raise ValueError(
                f"a range of inputs has a positive scale and a zero of -128 to 127, got {self.scale} and {self.zero}"
            )


@dataclass(frozen=True, eq=False)
class Stored:
    """A packed weight: the canonical tensors (see the top of this file) and what they mean.

    inputs: the stored range of its inputs, if it has one.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero_packed: torch.Tensor | None
    spec: Spec
    inputs: InputRange | None = None
    divisor: torch.Tensor | None = None

    def __post_init__(self) -> None:
        spec, packed = self.spec, self.packed
        if self.inputs is not None:
            self.inputs.check()
        if (self.zero_packed is None) != spec.symmetric:
            if spec.symmetric:
                raise ValueError("a symmetric weight has no zero points, got zero_packed")
            raise ValueError("an asymmetric weight needs zero points, got zero_packed=None")
        shapes = spec.shapes()
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(
                    f"{name} of a {spec.bits}-bit [{spec.n}, {spec.k}] weight is {shapes[name]}, "
                    f"got {tuple(tensor.shape)}"
                )
            dtypes = {"scale": FLOATS, "divisor": (torch.float32,)}.get(name, (torch.int32,))
            if tensor.dtype not in dtypes:
                wanted = {"scale": "fp32, bf16 or fp16", "divisor": "fp32"}.get(name, "int32")
                raise TypeError(f"{name} must be {wanted}, got {tensor.dtype}")
            if tensor.device != packed.device:
                raise ValueError(
                    f"{name} is on {tensor.device}, packed on {packed.device}; move them to one device"
                )

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are there, by name."""
        found = {
            "packed": self.packed,
            "scale": self.scale,
            "zero_packed": self.zero_packed,
            "divisor": self.divisor,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class Layout(NamedTuple):
    """What a backend multiplies by: built once from a `Stored`, never saved.

    tensors: by name; may be a mapping that changes, such as the buffers of a module. facts: the backend's own values.
    """

    tensors: Mapping[str, torch.Tensor]
    spec: Spec
    facts: Mapping[str, Any]
