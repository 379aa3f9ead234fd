"""McNemar's test: do two models answer the same questions equally often right?

Only questions that one of them gets right and the other wrong say anything. If both were equally good, each of those
n = gained + lost questions would fall to either side with probability 1/2, so the smaller count k is compared with
Binomial(n, 1/2) (McNemar, Psychometrika 12, 1947). The exact test is conservative; its mid-p variant counts only half
of the probability of what was observed and keeps close to the nominal level also for few questions (Fagerland, Lydersen
and Laake, BMC Medical Research Methodology 13:91, 2013).
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit_eval.errors import EvalError


@dataclass(frozen=True)
class McNemar:
    """gained: questions that only the model gets right; lost: only the baseline. Two-sided p-values."""

    gained: int
    lost: int
    p_exact: float
    p_mid: float


def mcnemar(gained: int, lost: int) -> McNemar:
    """The exact test and its mid-p variant for two counts; with none of either, both p-values are 1.

    The tail is summed in whole numbers, so that p-values are right for any counts. EvalError for a negative count.
    """
    if gained < 0 or lost < 0:
        raise EvalError(f"counts of questions must not be negative, got {gained} and {lost}")
    n, k = gained + lost, min(gained, lost)
    tail = term = 1  # C(n, 0); then up to C(n, k)
    for i in range(k):
        term = term * (n - i) // (i + 1)
        tail += term
    if n == 0:
        return McNemar(gained, lost, 1.0, 1.0)
    if gained == lost:
        return McNemar(gained, lost, 1.0, 1 - term / 2 ** (n + 1))
    return McNemar(gained, lost, tail / 2 ** (n - 1), (2 * tail - term) / 2**n)
