"""McNemar's test: published values, and the sum over all outcomes."""

from math import comb

import pytest
from quantkit_eval import EvalError
from quantkit_eval.mcnemar import mcnemar


def test_published_values():
    """Fagerland, Lydersen, Laake (2013), table 1: 1 and 7 discordant pairs of 21 children."""
    found = mcnemar(1, 7)
    assert found.p_exact == pytest.approx(0.0703, abs=5e-5)
    assert found.p_mid == pytest.approx(0.0391, abs=5e-5)


def test_p_values_are_sums_over_the_outcomes():
    for n in range(1, 13):
        for k in range(n + 1):
            found, here = mcnemar(k, n - k), comb(n, k)
            extreme = sum(comb(n, i) for i in range(n + 1) if comb(n, i) <= here) / 2**n
            own = here / 2**n * (1 if k * 2 != n else 0.5)
            assert found.p_exact == pytest.approx(extreme)
            assert found.p_mid == pytest.approx(extreme - own)
            assert (found.gained, found.lost) == (k, n - k)


def test_sides_count_alike_and_nothing_says_nothing():
    assert mcnemar(3, 30).p_mid == mcnemar(30, 3).p_mid
    assert (mcnemar(0, 0).p_exact, mcnemar(0, 0).p_mid) == (1, 1)


def test_many_questions_neither_overflow_nor_vanish():
    """Near the normal distribution's two-sided value: z = 200 / sqrt(20000) = 1.4142, p = 0.1573."""
    found = mcnemar(10100, 9900)
    assert found.p_mid == pytest.approx(0.1573, abs=1e-3)
    assert 0 < mcnemar(0, 1000).p_exact < 1e-300


def test_negative_counts_are_refused():
    with pytest.raises(EvalError, match="must not be negative, got -1 and 2"):
        mcnemar(-1, 2)
