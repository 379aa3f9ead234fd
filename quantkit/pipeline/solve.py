"""One weight quantized by all processes of a run: each solves some of its rows."""

from __future__ import annotations

from functools import partial

import torch

from quantkit.algorithms.catalog import algorithm
from quantkit.algorithms.config import AlgorithmConfig
from quantkit.algorithms.registry import Outcome
from quantkit.calibration.ranks import Ranks
from quantkit.numerics.statistics import Statistics
from quantkit.scheme import Grid


def solve(
    ranks: Ranks,
    weight: torch.Tensor,
    statistics: Statistics,
    grid: Grid,
    dtype: torch.dtype,
    config: AlgorithmConfig,
) -> Outcome:
    """Quantize `weight` [N, K] by the algorithm of `config`; the outcome is the same in all processes.

    statistics: used up. Rows that share a scale are solved by one process, the others are dealt out.
    """
    quantize = algorithm(config.name).quantize
    if ranks.size == 1:
        return quantize(weight, statistics, grid, dtype, config)
    parts = [weight] if grid.rows_share else weight.split(-(-len(weight) // ranks.size))
    work = [partial(quantize, part, statistics, grid, dtype, config) for part in parts]
    found = ranks.share([partial(_on_cpu, each) for each in work])
    statistics.hessian = statistics.drift = None  # in those too that had nothing to do
    return Outcome.stacked(found).to(weight.device)


def _on_cpu(work: partial[Outcome]) -> Outcome:
    return work().to("cpu")
