"""The formulas by hand."""

import math
import statistics

import pytest
import torch
from quantkit_eval import EvalError
from quantkit_eval.perplexity import fit, ratio, token_nll

F64 = torch.float64


def test_equal_windows_give_the_standard_error_of_the_mean():
    means = [2.0, 3.0, 5.0, 4.5]
    value, se = ratio(torch.tensor(means, dtype=F64) * 7, torch.full((4,), 7.0, dtype=F64))
    assert value == pytest.approx(statistics.mean(means))
    assert se == pytest.approx(statistics.stdev(means) / math.sqrt(4))


def test_unequal_windows_follow_the_ratio_estimator():
    value, se = ratio(torch.tensor([6.0, 2.0, 1.0], dtype=F64), torch.tensor([3.0, 2.0, 1.0], dtype=F64))
    assert value == pytest.approx(9 / 6)
    # residuals s - 1.5 t: 1.5, -1, -0.5; squares 3.5 in all
    assert se == pytest.approx(math.sqrt(3 / 2 * 3.5) / 6)


def test_the_ratio_error_is_the_spread_over_many_draws():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 30, (2000, 40), generator=generator).double()
    sums = counts * (3 + torch.randn(2000, 40, generator=generator, dtype=F64))
    found = [ratio(s, t) for s, t in zip(sums, counts, strict=True)]
    spread = statistics.stdev(value for value, _ in found)
    assert statistics.mean(se for _, se in found) == pytest.approx(spread, rel=0.05)


def test_one_window_has_no_error():
    counts = torch.tensor([2.0], dtype=F64)
    assert ratio(torch.tensor([4.0], dtype=F64), counts) == (2.0, None)
    assert fit(torch.tensor([4.0], dtype=F64), counts).perplexity_se is None


def test_perplexity_and_its_error_by_the_delta_method():
    sums, counts = torch.tensor([6.0, 10.0], dtype=F64), torch.tensor([4.0, 4.0], dtype=F64)
    found = fit(sums, counts)
    assert found.nll == pytest.approx(2.0)
    assert found.perplexity == pytest.approx(math.exp(2))
    assert found.nll_se == pytest.approx(0.5)  # window means 1.5 and 2.5
    assert found.perplexity_se == pytest.approx(math.exp(2) * 0.5)


def test_a_hopeless_model_is_told_and_not_infinite():
    with pytest.raises(EvalError, match="1000 nats per token"):
        fit(torch.tensor([1000.0], dtype=F64), torch.tensor([1.0], dtype=F64))


def test_nll_is_the_log_probability_of_the_target():
    log_p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    torch.testing.assert_close(
        token_nll(log_p, torch.tensor([1, 2])), torch.tensor([math.log(4), -math.log(0.7)])
    )
