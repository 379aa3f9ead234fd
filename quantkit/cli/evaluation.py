"""The rows and the footer of an evaluation report, as `quantize` and `eval` print them."""

from __future__ import annotations

from quantkit_eval.report import Fit, Report

Row = tuple[str, str, str]  # what, original, quantized


def evaluation_rows(evaluation: Report, names: tuple[str, str] = ("original", "quantized")) -> list[Row]:
    """Perplexity with its standard error; if two models were compared, also the paired comparison.

    names: what the table calls the two models, in its columns and so in its rows.
    """
    before, after = evaluation.original, evaluation.quantized
    rows = [("perplexity", _perplexity(before), _perplexity(after))]
    if before is None:
        return rows
    return [
        *rows,
        (
            "NLL per token, paired difference",
            "",
            plus_minus(evaluation.delta_nll, evaluation.delta_nll_se, 4),
        ),
        (
            f"KL({names[0]} || {names[1]}), mean",
            "",
            plus_minus(evaluation.kl_mean, evaluation.kl_mean_se, 5),
        ),
        (
            "KL median / p99 / max",
            "",
            f"{evaluation.kl_median:.4g} / {evaluation.kl_p99:.4g} / {evaluation.kl_max:.4g}",
        ),
        ("top-1 agreement", "", f"{evaluation.top1_agreement:.2%}"),
    ]


def evaluation_footer(evaluation: Report) -> str:
    """The line below the table: how much was measured, and whether the evaluation stopped early."""
    early = " (stopped early: the KL is known well enough)" if evaluation.stopped_early else ""
    cache = f"; {evaluation.cache}, as decoding sees it" if evaluation.cache else ""
    return (
        f"evaluated on {evaluation.tokens:,} tokens in windows of {evaluation.context}{early}; "
        f"± is one standard error, over windows{cache}"
    )


def _perplexity(result: Fit | None) -> str:
    return plus_minus(result.perplexity, result.perplexity_se, 4) if result else ""


def plus_minus(value: float | None, error: float | None, digits: int) -> str:
    """A value with its standard error, as far as they are known."""
    told = "" if value is None else f"{value:.{digits}f}"
    return told if error is None else f"{told} ± {error:.{digits}f}"
