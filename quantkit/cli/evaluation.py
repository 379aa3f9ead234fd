"""The rows and the footer of an evaluation report, as `quantize` and `eval` print them."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, str]  # what, original, quantized


def evaluation_rows(
    evaluation: dict[str, Any], names: tuple[str, str] = ("original", "quantized")
) -> list[Row]:
    """Perplexity with its standard error; if two models were compared, also the paired comparison.

    names: what the table calls the two models, in its columns and so in its rows.
    """
    before, after = evaluation.get("original"), evaluation["quantized"]
    rows = [("perplexity", _perplexity(before), _perplexity(after))]
    if before is None:
        return rows
    return [
        *rows,
        ("NLL per token, paired difference", "", _plus_minus(evaluation, "delta_nll", 4)),
        (f"KL({names[0]} || {names[1]}), mean", "", _plus_minus(evaluation, "kl_mean", 5)),
        (
            "KL median / p99 / max",
            "",
            " / ".join(f"{evaluation[key]:.4g}" for key in ("kl_median", "kl_p99", "kl_max")),
        ),
        ("top-1 agreement", "", f"{evaluation['top1_agreement']:.2%}"),
    ]


def evaluation_footer(evaluation: dict[str, Any]) -> str:
    """The line below the table: how much was measured, and whether the evaluation stopped early."""
    early = " (stopped early: the KL is known well enough)" if evaluation.get("stopped_early") else ""
    return (
        f"evaluated on {evaluation['tokens']:,} tokens in windows of {evaluation['context']}{early}; "
        "± is one standard error, over windows"
    )


def _perplexity(result: dict[str, Any] | None) -> str:
    return _plus_minus(result, "perplexity", 4) if result else ""


def _plus_minus(values: dict[str, Any], key: str, digits: int) -> str:
    error = values.get(f"{key}_se")
    told = f"{values[key]:.{digits}f}"
    return told if error is None else f"{told} ± {error:.{digits}f}"
