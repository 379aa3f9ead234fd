"""A number format for weights is a value with fields, never a class per bit width."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantkit.errors import RecipeError


@dataclass(frozen=True)
class Scheme:
    """How one weight [N, K] is stored.

    bits: 2..8. group_size: columns (along K) that share a scale; None = one scale per output channel (row).
    symmetric: the zero point is fixed at 2^(bits-1) and not stored.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    dtype: str = "int"

    @property
    def qmax(self) -> int:
        """Largest unsigned code."""
        return 2**self.bits - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric grid, as an unsigned code."""
        return 2 ** (self.bits - 1)

    def group(self, in_features: int) -> int:
        """Columns per scale for a weight with `in_features` columns."""
        return self.group_size or in_features

    def divides(self, in_features: int) -> bool:
        return in_features % self.group(in_features) == 0

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight, scales and zero points included, shape tensors not."""
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + (scale_bits + zero_bits) / self.group(in_features)

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size else "channel"
        return f"W{self.bits}A16 {group} {'sym' if self.symmetric else 'asym'}"


PRESETS: dict[str, Scheme] = {
    "W8A16": Scheme(8, None, True),
    "W6A16": Scheme(6, 128, True),
    "W4A16": Scheme(4, 128, True),
    "W4A16_ASYM": Scheme(4, 128, False),
    "W3A16": Scheme(3, 128, True),
    "W3A16_ASYM": Scheme(3, 128, False),
    "W2A16": Scheme(2, 64, False),
    "W2A16_SYM": Scheme(2, 64, True),
}


def preset(name: str, **overrides: object) -> Scheme:
    """The named preset, with fields replaced by `overrides`."""
    if name not in PRESETS:
        raise RecipeError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return replace(PRESETS[name], **overrides)
