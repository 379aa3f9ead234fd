"""Algorithms by name. One `quantize(weight, statistics, scheme, scale_dtype, config)` each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from quantkit.numerics.weight import QuantizedWeight


@dataclass
class Outcome:
    """What an algorithm returns: the weight, how far it is from the target, and every fallback it took."""

    weight: QuantizedWeight
    details: dict[str, float | int | str] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Algorithm:
    """`quantize(weight [N, K] fp32, Statistics, Scheme, scale dtype, config) -> Outcome` and what it must be fed.

    needs(config): the Statistics fields to collect, none for a data-free algorithm.
    """

    quantize: Callable[..., Outcome]
    needs: Callable[[object], frozenset[str]]


ALGORITHMS: dict[str, Algorithm] = {}


def register(name: str, needs: Callable[[object], frozenset[str]]) -> Callable:
    """Decorator: makes `quantize` available as `algorithm: name`."""

    def add(quantize: Callable[..., Outcome]) -> Callable[..., Outcome]:
        ALGORITHMS[name] = Algorithm(quantize, needs)
        return quantize

    return add
