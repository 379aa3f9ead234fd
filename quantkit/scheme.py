"""What a quantized tensor looks like, as values: number formats, grids, and the schemes made of them. Without torch.

    Number   how one value is coded: int4, fp8_e4m3, nf4, ...
    Grid     a Number and which values share a scale
    Scheme   the Grid of a linear's weights and, if its inputs are quantized too, of those
    KVScheme the Grids of a cache's keys and values, and which tokens stay exact

The words are those of compressed-tensors: bits is its num_bits, kind its type, granularity its strategy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

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

    granularity of a weight: one scale per tensor, channel (row), group (`group_size` columns of a row) or block
    (`group_size` rows by `group_size` columns). Of inputs: tensor, token, or group (`group_size` columns of a token).
    Of a KV cache: tensor, head, token (one per token and head; with a group_size: per `group_size` channels of it) or
    channel (one per head, channel and `group_size` tokens).
    symmetric: no zero point is stored, `midpoint` is the code of 0. Only integers can be asymmetric.
    dynamic: the scale is taken from the values when they are quantized, not stored. Weights never are.
    scale: what the scale is stored as; None: the float type of the model. "e8m0": a power of two (MX formats).
    "fp8_e4m3": FP8, times one float32 scale for the whole tensor (NVFP4).
    """

    number: Number
    granularity: Granularity
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale: str | None = None

    def __post_init__(self) -> None:
        sized, given = self.granularity in ("group", "block"), self.group_size is not None
        if sized != given and not (given and self.granularity in ("token", "channel")):
            raise ValueError(
                f"granularity {self.granularity!r} {'needs a' if sized else 'has no'} group_size, "
                f"got {self.group_size}"
            )
        if self.scale not in (None, "e8m0", "fp8_e4m3"):
            raise ValueError(f"a scale is stored as a float, 'e8m0' or 'fp8_e4m3', got {self.scale!r}")
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

    def rows(self, out_features: int) -> int:
        """Rows per scale of a weight with `out_features` rows; the last block may have fewer."""
        per_scale = {"tensor": out_features, "block": self.group_size or 1}
        return per_scale.get(self.granularity, 1)

    @property
    def rows_share(self) -> bool:
        """Whether rows of a weight have a scale in common, so that they are not quantized independently."""
        return self.granularity in ("tensor", "block") or self.two_level

    @property
    def whole_share(self) -> bool:
        """Whether all of a weight has a scale in common, which siblings that engines fuse must share as well."""
        return self.granularity == "tensor" or self.two_level

    @property
    def two_level(self) -> bool:
        """Whether the tensor has a float32 scale of its own beside those of its groups (NVFP4)."""
        return self.scale == "fp8_e4m3"

    @property
    def _shape(self) -> str:
        if self.group_size is None:
            return self.granularity
        size = f"{'b' if self.granularity == 'block' else 'g'}{self.group_size}"
        return size if self.granularity in ("group", "block") else f"{self.granularity} {size}"

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
    """How a KV cache is quantized: keys after rotary embedding, values as projected, each entry once.

    residual: the newest tokens, up to so many, stay exact (KIVI). sinks: the first so many tokens stay exact.
    rotate: queries and keys are multiplied by one Hadamard matrix before keys are rounded, which leaves their products
    as they are.
    """

    keys: Grid
    values: Grid
    residual: int = 0
    sinks: int = 0
    rotate: bool = False

    def __post_init__(self) -> None:
        for grid in (self.keys, self.values):
            size = grid.group_size
            if grid.granularity == "channel" and (not size or self.residual < size or self.residual % size):
                raise ValueError(
                    f"scales per channel are those of {size} tokens, which wait in the residual window until they are "
                    f"complete: residual must be a multiple of {size}, got {self.residual}"
                )

    @property
    def dynamic(self) -> bool:
        """Whether scales are taken from the entries themselves; else they are calibrated and stored."""
        return self.keys.dynamic

    def __str__(self) -> str:
        grids = f"KV {self.keys}" if self.keys == self.values else f"K {self.keys}, V {self.values}"
        exact = [f"{what} {n} exact" for what, n in (("first", self.sinks), ("last", self.residual)) if n]
        return ", ".join([grids, *exact, *(["rotated"] if self.rotate else [])])


def integer(bits: int = 4, group_size: int | None = 128, symmetric: bool = True) -> Grid:
    """The grid of integer weights: `group_size` columns share a scale, or with None a whole row does."""
    number = NUMBERS[f"int{bits}"]
    return Grid(number, "channel" if group_size is None else "group", group_size, symmetric)


_FP8, _FP4 = NUMBERS["fp8_e4m3"], NUMBERS["fp4_e2m1"]
INT8_TOKEN = Grid(NUMBERS["int8"], "token", dynamic=True)
FP8_TOKEN = Grid(_FP8, "token", dynamic=True)

PRESETS: dict[str, Scheme] = {
    "W8A16": Scheme(integer(8, None)),
    "W6A16": Scheme(integer(6)),
    "W4A16": Scheme(integer(4)),
    "W4A16_ASYM": Scheme(integer(4, symmetric=False)),
    "W3A16": Scheme(integer(3)),
    "W3A16_ASYM": Scheme(integer(3, symmetric=False)),
    "W2A16": Scheme(integer(2, 64, symmetric=False)),
    "W2A16_SYM": Scheme(integer(2, 64)),
    "W8A8": Scheme(integer(8, None), INT8_TOKEN),
    "W8A8_STATIC": Scheme(integer(8, None), Grid(NUMBERS["int8"], "tensor", symmetric=False)),
    "W4A8": Scheme(integer(4), INT8_TOKEN),
    "FP8_DYNAMIC": Scheme(Grid(_FP8, "channel"), FP8_TOKEN),
    "FP8": Scheme(Grid(_FP8, "tensor"), Grid(_FP8, "tensor")),
    "FP8_BLOCK": Scheme(Grid(_FP8, "block", 128), Grid(_FP8, "group", 128, dynamic=True)),
    "W8A16_FP8": Scheme(Grid(_FP8, "channel")),
    "NVFP4A16": Scheme(Grid(_FP4, "group", 16, scale="fp8_e4m3")),
    "MXFP4A16": Scheme(Grid(_FP4, "group", 32, scale="e8m0")),
    "NF4": Scheme(Grid(NUMBERS["nf4"], "group", 64)),
}


def _same(grid: Grid, **more: Any) -> KVScheme:
    return KVScheme(grid, grid, **more)


KV_PRESETS: dict[str, KVScheme] = {
    "FP8": _same(Grid(_FP8, "head")),
    "FP8_TENSOR": _same(Grid(_FP8, "tensor")),
    "INT8": _same(Grid(NUMBERS["int8"], "token", dynamic=True)),
    "INT4": _same(Grid(NUMBERS["int4"], "token", dynamic=True), rotate=True),
    "KIVI4": KVScheme(
        Grid(NUMBERS["int4"], "channel", 32, symmetric=False, dynamic=True),
        Grid(NUMBERS["int4"], "token", 32, symmetric=False, dynamic=True),
        residual=128,
    ),
    "KIVI2": KVScheme(
        Grid(NUMBERS["int2"], "channel", 32, symmetric=False, dynamic=True),
        Grid(NUMBERS["int2"], "token", 32, symmetric=False, dynamic=True),
        residual=128,
    ),
}
