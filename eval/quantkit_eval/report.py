"""The result of an evaluation: its numbers, as JSON and as a table of plain text."""

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

    tokens: scored tokens. text: names of the sources; text_sha256: of the joined text. delta_nll: nll(model) -
    nll(baseline), paired by window. kl_*: KL(baseline || model) per token in nats over the first kl_windows
    windows. top1_agreement: share of those tokens with the same likeliest token. *_se: standard errors over
    windows, None with a single window. max_tokens: the tokens of the text that were to be used, None: all of it.
    stopped_early: whether windows were left out because the standard error of kl_mean had fallen to the share of it
    that was asked for. cache: the key-value cache the model ran with, None: without one. cache_step: tokens it was
    given at a time, None: a window at once.
    """

    tokens: int
    windows: int
    context: int
    stride: int
    text: list[str]
    text_sha256: str
    quantized: Fit
    original: Fit | None = None
    delta_nll: float | None = None
    delta_nll_se: float | None = None
    kl_mean: float | None = None
    kl_mean_se: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_p99_se: float | None = None
    kl_max: float | None = None
    kl_windows: int | None = None
    top1_agreement: float | None = None
    top1_agreement_se: float | None = None
    max_tokens: int | None = None
    stopped_early: bool = False
    cache: str | None = None
    cache_step: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema "quantkit-eval/1" (docs/evaluation.md)."""
        return {"schema": SCHEMA} | asdict(self)


def table(report: Report) -> str:
    """The report as plain lines, two columns."""
    rows = [("perplexity", _plus_minus(report.quantized.perplexity, report.quantized.perplexity_se, 4))]
    if report.original:
        rows += [
            ("baseline", _plus_minus(report.original.perplexity, report.original.perplexity_se, 4)),
            ("paired difference of NLL", _plus_minus(report.delta_nll, report.delta_nll_se, 5)),
            ("KL(baseline || model)", _plus_minus(report.kl_mean, report.kl_mean_se, 5)),
            ("  median / p99 / max", f"{report.kl_median:.5f} / {report.kl_p99:.5f} / {report.kl_max:.5f}"),
            ("top-1 agreement", _plus_minus(report.top1_agreement, report.top1_agreement_se, 4)),
        ]
    early = ", stopped early: the KL is known well enough" if report.stopped_early else ""
    rows.append(("tokens", f"{report.tokens} in {report.windows} windows{early}"))
    rows.append(("context, stride", f"{report.context}, {report.stride}"))
    if report.cache:
        step = f"{report.cache_step} token(s) at a time" if report.cache_step else "a window at once"
        rows.append(("cache", f"{report.cache}, {step}"))
    wide = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{wide}}  {value}" for name, value in rows)


def _plus_minus(value: float | None, se: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if se is None else f" ± {se:.{digits}f}")
