"""The result of an evaluation, as values and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = "quantkit-eval/1"


@dataclass(frozen=True)
class Fit:
    """Perplexity = exp(nll); nll is the mean over tokens in nats; standard errors are over windows."""

    perplexity: float
    perplexity_se: float | None
    nll: float
    nll_se: float | None


@dataclass(frozen=True)
class Report:
    """One evaluation. `quantized` is the model asked about, `original` the baseline, if there was one.

    tokens: scored tokens. delta_nll: nll(model) - nll(baseline), paired by window. kl_*: KL(baseline || model) per
    token in nats over the first kl_windows windows. top1_agreement: share of those tokens with the same argmax.
    """

    tokens: int
    windows: int
    context: int
    stride: int
    text: list[str]
    quantized: Fit
    original: Fit | None = None
    delta_nll: float | None = None
    delta_nll_se: float | None = None
    kl_mean: float | None = None
    kl_mean_se: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    kl_windows: int | None = None
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema "quantkit-eval/1" (docs/evaluation.md)."""
        return {"schema": SCHEMA} | asdict(self)
