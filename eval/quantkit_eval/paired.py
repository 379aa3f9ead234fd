"""Is one model better than another? Answered from what both lost on the same windows of a text.

Two perplexities with their errors overlap long before two models are alike: most of the error is that some windows are
harder than others, for both. So the difference is taken window by window. With d_w the difference of the sums of window
w and t_w its tokens, the mean difference per token is sum d_w / sum t_w, with the ratio estimator's error of
`perplexity.ratio`; difference / error is compared with Student's t of n - 1 degrees of freedom, two-sided. Of many
comparisons some look significant by chance, so `holm` corrects the p-values of a whole table (Holm, A simple
sequentially rejective multiple test procedure, 1979): the chance that any of its answers is wrong stays below alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import torch

from quantkit_eval.errors import EvalError
from quantkit_eval.perplexity import ratio

Metric = Literal["kl", "nll"]
Answer = Literal["yes", "no", "undecided"]


@dataclass(frozen=True)
class WindowScores:
    """What each window of an evaluation gave, one entry per window.

    tokens: scored ones. nll, original_nll: summed over them, in nats, of the model and of the baseline. kl: summed
    KL(baseline || model), agreed: tokens with the same likeliest token; both perhaps of the first windows only. The
    last three are empty without a baseline.
    """

    tokens: tuple[int, ...]
    nll: tuple[float, ...]
    original_nll: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()
    agreed: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> WindowScores:
        """What `to_json` gave."""
        return cls(**{name: tuple(value[name]) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Comparison:
    """Model a beside model b: below 0, a is the better one.

    difference: of the mean per token, a - b, in nats; se: its standard error, None for a single window. p: of no
    difference, two-sided. p_corrected: p after Holm's correction. better: whether a is better than b.
    """

    a: str
    b: str
    metric: Metric
    difference: float
    se: float | None
    p: float
    p_corrected: float
    better: Answer

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def difference(a: WindowScores, b: WindowScores, metric: Metric) -> tuple[float, float | None, float]:
    """(mean difference per token a - b, its standard error, p) over the windows that both have.

    EvalError if the windows are not of the same tokens, or if there are none with this metric. Windows of as many
    tokens are taken for the same, unless a baseline's losses on them differ.
    """
    ours, others = getattr(a, metric), getattr(b, metric)
    count = min(len(ours), len(others))
    if not count or a.tokens[:count] != b.tokens[:count] or not _same_baseline(a, b, count):
        raise EvalError(
            f"no windows of the same tokens have a {metric} in both evaluations; evaluate both on one text, with one "
            "context, and for kl with a baseline"
        )
    sums = torch.tensor(ours[:count], dtype=torch.float64) - torch.tensor(others[:count], dtype=torch.float64)
    mean, se = ratio(sums, torch.tensor(a.tokens[:count], dtype=torch.float64))
    return mean, se, 1.0 if se is None else _p(mean, se, count - 1)


def _same_baseline(a: WindowScores, b: WindowScores, count: int) -> bool:
    """Whether the baseline's losses on the first windows agree, but for rounding; True if one has none."""
    pairs = zip(a.original_nll[:count], b.original_nll[:count], strict=False)
    return all(math.isclose(one, other, rel_tol=1e-3) for one, other in pairs)


def _p(mean: float, se: float, freedom: int) -> float:
    """P(|t| >= |mean| / se), by the incomplete beta function; without any spread, whether there is no difference."""
    if mean == 0:
        return 1.0
    if se == 0:
        return 0.0
    from mpmath import betainc

    t = mean / se
    return float(betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given: an answer is significant if its own is below alpha."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, number in enumerate(sorted(range(len(p)), key=lambda each: p[each])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[number]))
        corrected[number] = largest
    return corrected


def compare_all(scores: Mapping[str, WindowScores], metric: Metric, alpha: float = 0.05) -> list[Comparison]:
    """Every pair of models once, in the order given, corrected for all of them.

    A pair that agrees in every window is left undecided.
    """
    pairs = list(combinations(scores, 2))
    found = [difference(scores[a], scores[b], metric) for a, b in pairs]
    corrected = holm([p for _, _, p in found])
    return [
        Comparison(a, b, metric, mean, se, p, after, _answer(mean, after, alpha))
        for (a, b), (mean, se, p), after in zip(pairs, found, corrected, strict=True)
    ]


def _answer(mean: float, corrected: float, alpha: float) -> Answer:
    if corrected >= alpha:
        return "undecided"
    return "yes" if mean < 0 else "no"
