"""Weights quantized by all processes of a run: one by its rows, several a whole one each.

Who has something to be solved yields it as a `Problem` and is sent the `Outcome`. So several (the experts of a layer)
can be brought to their next problems side by side, and these are solved at once.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from quantkit.algorithms.catalog import algorithm
from quantkit.algorithms.config import AlgorithmConfig
from quantkit.algorithms.registry import Outcome
from quantkit.calibration.ranks import Ranks
from quantkit.numerics.statistics import Statistics
from quantkit.pipeline.clock import Clock
from quantkit.scheme import Grid

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """A weight to be quantized, and all that its algorithm is given.

    weights: linears that are solved as one, each [n, K] in any float dtype; they must stay as they are until then.
    statistics: of their input, used up. dtype: of the scales.
    """

    weights: Sequence[torch.Tensor]
    statistics: Statistics
    grid: Grid
    dtype: torch.dtype
    config: AlgorithmConfig

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    @property
    def alike(self) -> Hashable:
        """What problems have in common that an algorithm can solve as one batch."""
        rows = sum(map(len, self.weights))
        return rows, self.weights[0].shape[1], self.grid, self.dtype, self.config, self.device

    def matrix(self) -> torch.Tensor:
        """The weight, fp32 [N, K]."""
        return joined(self.weights)

    def let_go(self) -> None:
        """Free the large statistics: the problem is solved, or another process solves it."""
        self.statistics.hessian = self.statistics.drift = None


Steps = Generator[Problem, Outcome, T]


def joined(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Weights [n, K] one below the other, fp32 [N, K]; a single one in fp32 itself, not a copy."""
    first = weights[0]
    if len(weights) == 1 and first.dtype == torch.float32:
        return first
    rows = [len(weight) for weight in weights]
    whole = torch.empty(sum(rows), first.shape[1], device=first.device)
    for part, weight in zip(whole.split(rows), weights, strict=True):
        part.copy_(weight)
    return whole


def solve(ranks: Ranks, problem: Problem) -> Outcome:
    """Quantize one weight; the outcome is the same in all processes.

    Rows that share a scale are solved by one process, the others are dealt out.
    """
    if ranks.size == 1:
        return _solved([problem])[0]
    weight = problem.matrix()
    parts = [weight] if problem.grid.rows_share else weight.split(-(-len(weight) // ranks.size))
    rows = [replace(problem, weights=[part]) for part in parts]
    outcome = Outcome.stacked(_dealt_out(ranks, rows)).to(problem.device)
    problem.let_go()  # in those too that had nothing to do
    return outcome


def solve_all(ranks: Ranks, problems: Sequence[Problem]) -> list[Outcome]:
    """Quantize several weights, each in one process (see `Ranks.does`), which alone needs its large statistics: so a
    Hessian is factored once. The outcomes are the same in all processes.
    """
    if ranks.size == 1:
        return _solved(problems)
    found = _dealt_out(ranks, problems)
    for problem in problems:
        problem.let_go()
    return [outcome.to(problem.device) for problem, outcome in zip(problems, found, strict=True)]


def run_steps(ranks: Ranks, sequences: Sequence[Steps[T]], clock: Clock) -> list[T]:
    """Bring each of `sequences` to its end, side by side: problems that they come to together are solved at once.

    Returns what each of them returns. All processes must give as many, which yield the same problems.
    """
    ended: dict[int, T] = {}
    outcomes: dict[int, Outcome] = {}
    while len(ended) < len(sequences):
        problems: dict[int, Problem] = {}
        for number, steps in enumerate(sequences):
            if number in ended:
                continue
            try:
                problems[number] = steps.send(outcomes.pop(number)) if number in outcomes else next(steps)
            except StopIteration as end:
                ended[number] = end.value
                continue
            if len(sequences) > 1 and not ranks.does(len(problems) - 1):
                problems[number].let_go()  # before the next one collects its statistics
        with clock("quantize"):
            if len(sequences) > 1:
                found = solve_all(ranks, list(problems.values()))
            else:
                found = [solve(ranks, problem) for problem in problems.values()]
        outcomes = dict(zip(problems, found, strict=True))
        del found
    return [ended[number] for number in range(len(sequences))]


def _dealt_out(ranks: Ranks, problems: Sequence[Problem]) -> list[Outcome]:
    """The outcomes, on the CPU, of problems of which each process has solved its share."""
    work = [partial(_on_cpu, problems[rank :: ranks.size]) for rank in range(ranks.size)]
    found = ranks.share(work)
    return [found[number % ranks.size][number // ranks.size] for number in range(len(problems))]


def _on_cpu(problems: Sequence[Problem]) -> list[Outcome]:
    return [outcome.to("cpu") for outcome in _solved(problems)]


def _solved(problems: Sequence[Problem]) -> list[Outcome]:
    """The outcomes of problems solved in this process: those that are alike as one batch, if their algorithm can."""
    batches: dict[Hashable, list[int]] = {}
    for number, problem in enumerate(problems):
        batches.setdefault(problem.alike, []).append(number)
    outcomes: dict[int, Outcome] = {}
    for numbers in batches.values():
        batch = [problems[number] for number in numbers]
        outcomes |= zip(numbers, _solved_alike(batch), strict=True)
    return [outcomes[number] for number in range(len(problems))]


def _solved_alike(problems: Sequence[Problem]) -> list[Outcome]:
    """The outcomes of problems that are `alike`."""
    first = problems[0]
    known, given = algorithm(first.config.name), (first.grid, first.dtype, first.config)
    if known.quantize_all is None or len(problems) == 1:
        return [known.quantize(each.matrix(), each.statistics, *given) for each in problems]
    weights, statistics = [each.matrix() for each in problems], [each.statistics for each in problems]
    return known.quantize_all(weights, statistics, *given)
