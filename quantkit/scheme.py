"""What a quantized tensor looks like, as values: number formats, grids, and the schemes made of them. Without torch.

    Number   how one value is coded: int4, fp8_e4m3, nf4, ...
    Grid     a Number and which values share a scale
    Scheme   the Grid of a linear's weights and, if its inputs are quantized too, of those
    KVScheme the Grids of a cache's keys and values

The words are those of compressed-tensors: bits is its num_bits, kind its type, granularity its strategy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["int", "float", "table"]
Granularity = Literal["tensor", "channel", "group", "token", "block", "head"]


@dataclass(frozen=True)
class Number:
    """How one value is coded; `numerics/number.py` rounds to it. A new format is an entry of NUMBERS.

    name: "int4", "fp8_e4m3", ... bits: of one code. kind: "int" are equal steps around a zero point, "float" a sign,
    an exponent and a mantissa, "table" a list of values. zero: the code that stands for 0 if no zero point is stored.
    values: what each code stands for (not of integers); NaN or infinity: a code that is never written.
    """

    name: str
    bits: int
    kind: Kind
    zero: int = 0
    values: tuple[float, ...] = field(default=(), repr=False, compare=False)


def _floating(name: str, exponent: int, mantissa: int, finite: int, beyond: float = math.nan) -> Number:
    """A float with a sign bit and that many bits of exponent and mantissa, subnormals included.

    finite: how many non-negative codes are finite. beyond: what the first code after them stands for; the rest is NaN.
    """
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    positive = []
    for code in range(2 ** (exponent + mantissa)):
        power, fraction = divmod(code, steps)
        value = (fraction + steps * (power > 0)) * 2.0 ** (max(power, 1) - bias - mantissa)
        positive.append(value if code < finite else beyond if code == finite else math.nan)
    return Number(name, 1 + exponent + mantissa, "float", 0, (*positive, *(-value for value in positive)))


# QLoRA (Dettmers et al. 2023), appendix E: quantiles of the normal distribution, with an exact zero.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

NUMBERS: dict[str, Number] = {
    **{f"int{bits}": Number(f"int{bits}", bits, "int", 2 ** (bits - 1)) for bits in range(2, 9)},
    "fp8_e4m3": _floating("fp8_e4m3", 4, 3, finite=127),
    "fp8_e5m2": _floating("fp8_e5m2", 5, 2, finite=124, beyond=math.inf),
    "fp4_e2m1": _floating("fp4_e2m1", 2, 1, finite=8),
    "nf4": Number("nf4", 4, "table", 7, _NF4),
}


@dataclass(frozen=True)
class Grid:
    """The values a tensor is rounded to: a number format, and which elements share a scale.

    granularity: one scale per tensor, channel (row of a weight), group (`group_size` columns of a row), block
    (`group_size` rows by `group_size` columns), token (row of the inputs), or head (of a KV cache).
    symmetric: no zero point is stored, `midpoint` is the code of 0. Only integers can be asymmetric.
    dynamic: the scale is taken from the values when they are quantized, not stored. Weights never are.
    scale: the number format the scale itself is stored in; None: the float type of the model.
    """

    number: Number
    granularity: Granularity
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale: str | None = None

    def __post_init__(self) -> None:
        sized = self.granularity in ("group", "block")
        if sized != (self.group_size is not None):
            raise ValueError(
                f"granularity {self.granularity!r} {'needs a' if sized else 'has no'} group_size, "
                f"got {self.group_size}"
            )
        if not self.symmetric and self.number.kind != "int":
            raise ValueError(f"only integers can be asymmetric, got {self.number.name}")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.number.bits

    @property
    def qmax(self) -> int:
        """Largest code, as an unsigned number."""
        return (1 << self.number.bits) - 1

    @property
    def midpoint(self) -> int:
        """The code that stands for 0 on a symmetric grid."""
        return self.number.zero

    def group(self, in_features: int) -> int:
        """Columns per scale of a weight with `in_features` columns."""
        return self.group_size or in_features

    def divides(self, in_features: int) -> bool:
        """Whether `in_features` columns are whole groups."""
        return in_features % self.group(in_features) == 0

    @property
    def _shape(self) -> str:
        return (
            f"{'b' if self.granularity == 'block' else 'g'}{self.group_size}"
            if self.group_size
            else self.granularity
        )

    def __str__(self) -> str:
        zero = "" if self.symmetric else " asym"
        return f"{self.number.name} {self._shape}{zero}"


@dataclass(frozen=True)
class Scheme:
    """How one linear is quantized: its weight [N, K] and, unless `inputs` is None, its inputs [tokens, K]."""

    weights: Grid
    inputs: Grid | None = None

    def __str__(self) -> str:
        w = self.weights
        number = "" if w.number.kind == "int" else f"{w.number.name} "
        zero = "" if w.number.kind != "int" else " sym" if w.symmetric else " asym"
        name = f"W{w.bits}A{self.inputs.bits if self.inputs else 16} {number}{w._shape}{zero}"
        return name if self.inputs is None else f"{name}, inputs {self.inputs}"


@dataclass(frozen=True)
class KVScheme:
    """How a KV cache is quantized."""

    keys: Grid
    values: Grid

    def __str__(self) -> str:
        return f"KV {self.keys}" if self.keys == self.values else f"K {self.keys}, V {self.values}"


def integer(bits: int = 4, group_size: int | None = 128, symmetric: bool = True) -> Grid:
    """The grid of integer weights: `group_size` columns share a scale, or with None a whole row does."""
    number = NUMBERS[f"int{bits}"]
    return Grid(number, "channel" if group_size is None else "group", group_size, symmetric)


PRESETS: dict[str, Scheme] = {
    "W8A16": Scheme(integer(8, None)),
    "W6A16": Scheme(integer(6)),
    "W4A16": Scheme(integer(4)),
    "W4A16_ASYM": Scheme(integer(4, symmetric=False)),
    "W3A16": Scheme(integer(3)),
    "W3A16_ASYM": Scheme(integer(3, symmetric=False)),
    "W2A16": Scheme(integer(2, 64, symmetric=False)),
    "W2A16_SYM": Scheme(integer(2, 64)),
}
