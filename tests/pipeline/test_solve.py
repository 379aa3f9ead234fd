"""Problems that are solved at once, in one process and in several, have the outcomes that each has alone."""

from dataclasses import replace

import pytest
import torch

from quantkit.algorithms.catalog import algorithm
from quantkit.algorithms.config import GptqConfig, RtnConfig
from quantkit.calibration.ranks import ALONE, Ranks
from quantkit.numerics.statistics import Statistics
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.solve import Problem, run_steps, solve, solve_all
from quantkit.scheme import integer

GRID, GPTQ = integer(4, 16), GptqConfig(name="gptq", retarget=0.0)
K = 32


def problem(seed, n=8, config=GPTQ):
    """A weight in two parts with a Hessian."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * K, K, generator=generator)
    weights = torch.randn(n, K, generator=generator).split([n - 3, 3])
    statistics = Statistics(len(x), hessian=2 / len(x) * x.T @ x, mean_square=x.square().mean(0))
    return Problem(weights, statistics, GRID, torch.float32, config)


def alone(seed, **given):
    each = problem(seed, **given)
    return algorithm(each.config.name).quantize(
        each.matrix(), each.statistics, GRID, torch.float32, each.config
    )


def assert_equal(found, wanted):
    assert torch.equal(found.weight.codes, wanted.weight.codes)
    assert torch.equal(found.weight.scale, wanted.weight.scale)
    assert (found.details, found.fallbacks) == (wanted.details, wanted.fallbacks)


class Two(Ranks):
    """The first of two processes, which does the work of both when work is shared."""

    size = 2

    def __init__(self):
        self.shared = []

    def share(self, work):
        self.shared.append(len(work))
        return [each() for each in work]


@pytest.fixture
def solved(monkeypatch):
    """(rows, whether in a batch) of every weight that GPTQ is given. It uses up no statistics: the processes of `Two`
    share them.
    """
    seen, gptq = [], algorithm("gptq")
    assert gptq.quantize_all is not None

    def quantize(weight, statistics, *given):
        seen.append((len(weight), False))
        return gptq.quantize(weight, replace(statistics), *given)

    def quantize_all(weights, statistics, *given):
        seen.extend((len(weight), True) for weight in weights)
        return [gptq.quantize(w, replace(s), *given) for w, s in zip(weights, statistics, strict=True)]

    def use(batched):
        known = replace(gptq, quantize=quantize, quantize_all=quantize_all if batched else None)
        monkeypatch.setattr(
            "quantkit.pipeline.solve.algorithm", lambda name: known if name == "gptq" else algorithm(name)
        )
        return seen

    return use


@pytest.mark.parametrize("ranks", [ALONE, Two()], ids=["one process", "two"])
@pytest.mark.parametrize("batched", [False, True])
def test_several_are_solved_whole_and_in_order(solved, ranks, batched):
    seen = solved(batched)
    nearest = RtnConfig(name="rtn", range="weighted")
    given = [problem(0), problem(1, n=5), problem(2), problem(3, config=nearest), problem(4)]
    found = solve_all(ranks, given)
    wanted = [alone(0), alone(1, n=5), alone(2), alone(3, config=nearest), alone(4)]
    for one, other in zip(found, wanted, strict=True):
        assert_equal(one, other)
    assert sorted(seen) == [(5, False), *[(8, batched)] * 3]  # those of one shape as one batch
    assert ranks is ALONE or all(each.statistics.hessian is None for each in given)


def test_one_has_its_rows_shared_out(solved):
    seen = solved(False)
    given = problem(0)
    found = solve(Two(), given)
    assert seen == [(4, False), (4, False)]
    assert_equal(found, alone(0))
    assert given.statistics.hessian is None


def steps(name, problems):
    """A generator that wants `problems` solved and returns its name with the outcomes."""
    found = []
    for each in problems:
        found.append((yield each))
    return name, found


def test_what_comes_to_problems_side_by_side_is_solved_at_once(monkeypatch):
    counts = []

    def watched(ranks, problems):
        counts.append(len(problems))
        return solve_all(ranks, problems)

    monkeypatch.setattr("quantkit.pipeline.solve.solve_all", watched)
    seeds = {"a": [0, 1, 2], "none": [], "b": [3]}
    sequences = [steps(name, map(problem, own)) for name, own in seeds.items()]
    found = run_steps(ALONE, sequences, Clock())
    assert [name for name, _ in found] == list(seeds)
    assert counts[:3] == [2, 1, 1]
    for name, outcomes in found:
        for outcome, seed in zip(outcomes, seeds[name], strict=True):
            assert_equal(outcome, alone(seed))


def test_a_process_keeps_the_hessians_of_its_own_problems():
    given = [problem(seed) for seed in range(3)]

    def last():
        assert [each.statistics.hessian is None for each in given] == [False, True, False]
        raise InterruptedError
        yield

    with pytest.raises(InterruptedError):
        run_steps(Two(), [*(steps("", [each]) for each in given), last()], Clock())
