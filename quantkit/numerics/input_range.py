"""Which range of a linear's inputs one stored scale covers: all of it, nearly all of it, or what rounds best.

    minmax      from the smallest input to the largest
    percentile  without the 0.01 % that are farthest out (of asymmetric grids: half of them at each end)
    mse         the range times f with the least squared error of rounding, f from 1 down to 1/64 in steps of 2^(-1/8)

Where values are wanted one by one, they are counted by the upper half of their float32 bits (sign, exponent and seven
bits of the fraction): 65536 counts say where they lie to 0.4 %, whatever their range, and one pass over the text fills
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from quantkit.numerics.inputs import FP8_LARGEST, InputScale, input_scale, round_inputs
from quantkit.scheme import Grid

Method = Literal["minmax", "percentile", "mse"]
BINS = 1 << 16
_INSIDE = 0.9999  # share of the values that a percentile keeps
_FACTORS = [2 ** (-i / 8) for i in range(49)]


@dataclass(frozen=True)
class InputRange:
    """What the inputs of a linear were. low, high: the smallest and the largest, fp32 [1].

    counts: int64 [65536], how many values had these upper 16 bits; None: not counted.
    """

    low: torch.Tensor
    high: torch.Tensor
    counts: torch.Tensor | None = None

    @property
    def finite(self) -> bool:
        """Whether no input was NaN or infinite."""
        return bool(torch.isfinite(self.low).all() and torch.isfinite(self.high).all())


def count(x: torch.Tensor) -> torch.Tensor:
    """The counts [65536] of the values of `x`, fp32 of any shape."""
    upper = x.contiguous().view(torch.int32).flatten() >> 16
    return torch.bincount(upper & (BINS - 1), minlength=BINS)


def choose(found: InputRange, grid: Grid, method: Method, dtype: torch.dtype) -> InputScale:
    """The stored scale (and zero point) of a static grid. dtype: of the scale. Methods but minmax need `counts`."""
    low, high = found.low, found.high
    if method == "percentile":
        low, high = _percentiles(found, grid)
    elif method == "mse":
        low, high = _least_error(found, grid, dtype)
    return input_scale(low, high, grid, dtype)


def clipped(found: InputRange, scale: InputScale, grid: Grid) -> float:
    """Share of the counted values that the scale cannot reach, by more than half a step of an integer grid."""
    values, counts = _values(found)
    low, high = (-128.5, 127.5) if grid.number.kind == "int" else (-FP8_LARGEST, FP8_LARGEST)
    zero = 0.0 if scale.zero is None else float(scale.zero)
    step = float(scale.scale)
    outside = (values < (low - zero) * step) | (values > (high - zero) * step)
    return float(counts[outside].sum() / counts.sum().clamp(min=1))


def _values(found: InputRange) -> tuple[torch.Tensor, torch.Tensor]:
    """(values that were seen, in rising order, fp32; how often, fp64); of each count the middle of its interval."""
    assert found.counts is not None, "values were not counted"
    upper = found.counts.nonzero().flatten()
    values = ((upper << 16) | 0x8000).to(torch.int32).view(torch.float32)
    values[upper == 0] = 0
    values, order = values.clamp_(float(found.low), float(found.high)).sort()
    return values, found.counts[upper][order].double()


def _percentiles(found: InputRange, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    values, counts = _values(found)
    if grid.symmetric:
        values, order = values.abs().sort()
        high = _at(values, counts[order], _INSIDE)
        return -high, high
    beyond = (1 - _INSIDE) / 2
    return _at(values, counts, beyond), _at(values, counts, 1 - beyond)


def _at(values: torch.Tensor, counts: torch.Tensor, share: float) -> torch.Tensor:
    """The value [1] up to which that share of all values lies."""
    upto = counts.cumsum(0)
    at = int(torch.searchsorted(upto, upto[-1:] * share))
    return values[min(at, len(values) - 1)].view(1)


def _least_error(found: InputRange, grid: Grid, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    values, counts = _values(found)
    errors = []
    for factor in _FACTORS:
        rounded = round_inputs(
            values, grid, input_scale(found.low * factor, found.high * factor, grid, dtype)
        )
        errors.append(float(((rounded - values).double().square() * counts).sum()))
    best = _FACTORS[errors.index(min(errors))]
    return found.low * best, found.high * best
