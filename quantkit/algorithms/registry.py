"""Algorithms by name. An algorithm is one function `quantize(weight, statistics, grid, scale_dtype, config)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quantkit.numerics.weight import QuantizedWeight


@dataclass
class Outcome:
    """What an algorithm returns for a weight [N, K]. Linears that share an input may be quantized as one weight.

    error, norm: the objective the algorithm minimised and what it is with all weights zero, fp [N], one value per row;
    None if it is the squared error of the weight itself. counts: more values per row [N], reported as their sum.
    details: facts about the whole weight. fallbacks: what was done in another way than asked, a sentence each.
    """

    weight: QuantizedWeight
    error: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    details: dict[str, float | int | str] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)

    def rows(self, rows: slice) -> Outcome:
        """The outcome of some output channels."""
        return replace(
            self,
            weight=self.weight.rows(rows),
            error=None if self.error is None else self.error[rows],
            norm=None if self.norm is None else self.norm[rows],
            counts={name: count[rows] for name, count in self.counts.items()},
        )

    def to(self, device: torch.device | str) -> Outcome:
        """The same with all tensors on a device."""
        return replace(
            self,
            weight=self.weight.to(device),
            error=None if self.error is None else self.error.to(device),
            norm=None if self.norm is None else self.norm.to(device),
            counts={name: count.to(device) for name, count in self.counts.items()},
        )

    @classmethod
    def stacked(cls, parts: Sequence[Outcome]) -> Outcome:
        """One outcome of several that have the rows of a weight one after the other, the rest in common."""
        first = parts[0]
        if len(parts) == 1:
            return first
        errors = [part.error for part in parts if part.error is not None]
        norms = [part.norm for part in parts if part.norm is not None]
        return replace(
            first,
            weight=QuantizedWeight.stacked([part.weight for part in parts]),
            error=torch.cat(errors) if errors else None,
            norm=torch.cat(norms) if norms else None,
            counts={name: torch.cat([part.counts[name] for part in parts]) for name in first.counts},
        )


Quantize = Callable[..., Outcome]
QuantizeAll = Callable[..., list[Outcome]]


@dataclass(frozen=True)
class Algorithm:
    """`quantize(weight [N, K] fp32, Statistics, Grid, scale dtype, config) -> Outcome` and what it must be fed.

    needs(config): the Statistics fields to collect, none for a data-free algorithm. quantize_all: the same for a batch
    of weights of one shape, (weights, their Statistics, Grid, scale dtype, config) -> their Outcomes; None: they are
    quantized one after the other.
    """

    quantize: Quantize
    needs: Callable[[Any], frozenset[str]]
    quantize_all: QuantizeAll | None = None


ALGORITHMS: dict[str, Algorithm] = {}


def register(
    name: str, needs: Callable[[Any], frozenset[str]], quantize_all: QuantizeAll | None = None
) -> Callable[[Quantize], Quantize]:
    """Decorator: makes `quantize` available as `algorithm: name`."""

    def add(quantize: Quantize) -> Quantize:
        ALGORITHMS[name] = Algorithm(quantize, needs, quantize_all)
        return quantize

    return add
