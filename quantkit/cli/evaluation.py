"""The rows of an evaluation report, for `quantize` and `eval` alike."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, str]  # what, original, quantized


def evaluation_rows(evaluation: dict[str, Any]) -> list[Row]:
    """Perplexity with its standard error; with a baseline ("original") also the paired comparison."""
    before, after = evaluation.get("original"), evaluation["quantized"]
    rows = [("perplexity", _perplexity(before), _perplexity(after))]
    if before is None:
        return rows
    return [
        *rows,
        ("NLL per token, paired difference", "", _plus_minus(evaluation, "delta_nll", 4)),
        ("KL(original || quantized), mean", "", _plus_minus(evaluation, "kl_mean", 5)),
        (
            "KL median / p99 / max",
            "",
            " / ".join(f"{evaluation[key]:.4g}" for key in ("kl_median", "kl_p99", "kl_max")),
        ),
        ("top-1 agreement", "", f"{evaluation['top1_agreement']:.2%}"),
    ]


def evaluation_footer(evaluation: dict[str, Any]) -> str:
    return (
        f"evaluated on {evaluation['tokens']:,} tokens in windows of {evaluation['context']}; "
        "± is one standard error, over windows"
    )


def _perplexity(result: dict[str, Any] | None) -> str:
    return _plus_minus(result, "perplexity", 4) if result else ""


def _plus_minus(values: dict[str, Any], key: str, digits: int) -> str:
    error = values.get(f"{key}_se")
    told = f"{values[key]:.{digits}f}"
    return told if error is None else f"{told} ± {error:.{digits}f}"
