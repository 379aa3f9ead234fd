"""Whether an evaluation shows what a gate asks for: the whole confidence interval must lie under the limit.

Without torch. A new limit, such as the accuracy on a task, is a field of `GatePart` and an entry of METRICS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from quantkit.recipe.target import GatePart

if TYPE_CHECKING:
    from quantkit_eval.report import Report


@dataclass(frozen=True, kw_only=True)
class Check:
    """One limit. value, low, high: what was measured and its confidence interval, in the unit of the limit.

    low, high: None if there is no standard error, as of a single window; such a limit is not kept.
    """

    metric: str
    limit: float
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def passed(self) -> bool:
        return self.high is not None and self.high < self.limit

    @property
    def excess(self) -> float:
        """The end of the interval over the limit: at most 1 if it is kept."""
        return math.inf if self.high is None else self.high / self.limit

    def __str__(self) -> str:
        kept = "kept" if self.passed else "not kept"
        if self.high is None:
            return f"{self.metric} {self.value:.5g}, limit {self.limit:g}: {kept}, as one window has no standard error"
        return f"{self.metric} {self.value:.5g} ({self.low:.5g} to {self.high:.5g}), limit {self.limit:g}: {kept}"


@dataclass(frozen=True)
class Measured:
    """A value, its standard error over windows, and from the scale it is normal on to that of the limit."""

    value: float | None
    se: float | None
    shown: Callable[[float], float] = lambda value: value


def _perplexity(report: Report, limit: float | str) -> Measured:
    """A perplexity, or its growth over the original's: both are normal as mean logarithms, the second is paired."""
    if isinstance(limit, str):
        return Measured(report.delta_nll, report.delta_nll_se, math.expm1)
    return Measured(report.quantized.nll, report.quantized.nll_se, math.exp)


METRICS: dict[str, Callable[[Report, float | str], Measured]] = {
    "kl_mean": lambda report, limit: Measured(report.kl_mean, report.kl_mean_se),
    "kl_p99": lambda report, limit: Measured(report.kl_p99, report.kl_p99_se),
    "perplexity": _perplexity,
}


def judge(gate: GatePart, report: Report) -> list[Check]:
    """Each limit of a gate, against an evaluation beside the original model."""
    return [_check(gate, report, metric, limit) for metric, limit in gate.limits.items()]


def _check(gate: GatePart, report: Report, metric: str, limit: float | str) -> Check:
    found = METRICS[metric](report, limit)
    assert found.value is not None
    number = float(limit[1:-1]) / 100 if isinstance(limit, str) else limit
    name = f"growth of {metric}" if isinstance(limit, str) else metric
    if found.se is None:
        return Check(metric=name, limit=number, value=found.shown(found.value))
    windows = (report.kl_windows if metric.startswith("kl") else report.windows) or report.windows
    reach = quantile(gate.confidence, windows - 1) * found.se
    ends = [found.shown(found.value - reach), found.shown(found.value + reach)]
    return Check(metric=name, limit=number, value=found.shown(found.value), low=ends[0], high=ends[1])


def quantile(confidence: float, freedom: int) -> float:
    """The two-sided quantile of Student's t, from that of the normal distribution (Abramowitz and Stegun, 26.7.5).

    Within 1 % of it from 5 degrees of freedom on at a confidence of 0.95; too small for fewer.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(sum(term / max(1, freedom) ** power for power, term in enumerate(terms)))
