"""Rounding to number formats: integers, small floats and tables of values.

`x = w / s`, a value in units of its scale, is rounded to the nearest *level* of the format. A level is what a code
stands for: q - z of an integer, the value itself of a float or a table entry, so that w_hat = level * s for all.
Ties go to the even level (integers) or code (floats, tables). Values outside the range take the level at its end.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from quantkit.scheme import Number

_LARGEST_FP8 = 448.0
_NEGATIVE_ZERO = 128  # the code of FP8
Nearest = Callable[..., torch.Tensor]


def bounds(zero: torch.Tensor, number: Number) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest level of integers with these zero points, for `nearest`; other formats ignore them."""
    return -zero, 2**number.bits - 1 - zero


def nearest(number: Number) -> Nearest:
    """The function (x, low, high, out=x) -> levels that rounds `x` (fp32 or fp64), in place if no `out` is given.

    low, high: see `bounds`.
    """
    return _round_integers if number.kind == "int" else functools.partial(_round_to_table, number)


def encode(x: torch.Tensor, number: Number, zero: torch.Tensor | None = None) -> torch.Tensor:
    """The codes, uint8, of the levels nearest to `x` (fp32 or fp64).

    zero: zero points of integers, as numbers that broadcast to x; None: the format's own zero. The float formats'
    negative zero and codes that are not finite are never the answer.
    """
    if _is_native(number, x):
        short: torch.Tensor = x.clamp(-_LARGEST_FP8, _LARGEST_FP8).to(torch.float8_e4m3fn).view(torch.uint8)
        return short.masked_fill_(short == _NEGATIVE_ZERO, 0)
    if number.kind != "int":
        table = rising_levels(number, x.dtype, x.device)
        return table.codes[torch.bucketize(x, table.edges)]
    zero = torch.full((), number.zero, dtype=x.dtype, device=x.device) if zero is None else zero
    return _round_integers(x.clone(), *bounds(zero, number)).add_(zero).to(torch.uint8)


def decode(
    codes: torch.Tensor, number: Number, zero: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The levels, as `dtype`, of codes of any integer type; zero as in `encode`."""
    if number.name == "fp8_e4m3" and codes.dtype == torch.uint8:
        return codes.view(torch.float8_e4m3fn).to(dtype)
    if number.kind != "int":
        return torch.tensor(number.values, dtype=dtype, device=codes.device)[codes.long()]
    return codes.to(dtype).sub_(number.zero if zero is None else zero)


@functools.lru_cache(maxsize=16)
def byte_values(number: Number) -> torch.Tensor:
    """The level, fp32 [256], of every byte as a code of a float format or a table; NaN for one that is none."""
    return torch.tensor((*number.values, *[math.nan] * (256 - len(number.values))), dtype=torch.float32)


def largest(number: Number) -> float:
    """The largest level of a float or a table."""
    return max(value for value in number.values if math.isfinite(value))


def _round_integers(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    return (x.round_() if out is None else torch.round(x, out=out)).clamp_(low, high)


def _round_to_table(
    number: Number, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    if _is_native(number, x):
        return (x if out is None else out).copy_(x.clamp(-_LARGEST_FP8, _LARGEST_FP8).to(torch.float8_e4m3fn))
    table = rising_levels(number, x.dtype, x.device)
    return torch.take(table.levels, torch.bucketize(x, table.edges), out=x if out is None else out)


def _is_native(number: Number, x: torch.Tensor) -> bool:
    """Whether torch itself rounds `x` as the table of the format does: to the nearest, ties to the even code."""
    return number.name == "fp8_e4m3" and x.dtype == torch.float32


class Table(NamedTuple):
    """levels, codes [L], by rising level. edges [L - 1]: the largest x that is rounded to each level but the last."""

    levels: torch.Tensor
    codes: torch.Tensor
    edges: torch.Tensor


@functools.lru_cache(maxsize=64)
def rising_levels(number: Number, dtype: torch.dtype, device: torch.device) -> Table:
    """The levels of a float format or a table, and what is rounded to each."""
    code_of: dict[float, int] = {}
    for code, value in enumerate(number.values):
        if math.isfinite(value):
            code_of.setdefault(value, code)  # negative zero equals zero, which comes first
    levels = sorted(code_of)
    codes = [code_of[level] for level in levels]
    exact = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(levels)], dtype=torch.float64)
    edges = exact.to(dtype)
    upper_is_even = torch.tensor([code % 2 == 0 for code in codes[1:]])
    below = torch.nextafter(edges, torch.full_like(edges, -math.inf))
    away = (edges.double() > exact) | ((edges.double() == exact) & upper_is_even)
    return Table(
        torch.tensor(levels, dtype=dtype, device=device),
        torch.tensor(codes, dtype=torch.uint8, device=device),
        torch.where(away, below, edges).to(device),
    )
