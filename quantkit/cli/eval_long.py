"""`quantkit eval --long`: long texts of a model against those of a baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from quantkit.cli.opening import Opening
from quantkit.cli.output import Screen, deliver, make_console

if TYPE_CHECKING:
    from quantkit_eval import LongReport, Side
    from quantkit_eval.long_report import Writing


def compare_long(
    model: str,
    baseline: str | None,
    text: list[str],
    tokens: int,
    opening: Opening,
    run_in: str,
    json_file: str | None,
) -> None:
    """Write texts of so many tokens with MODEL and with the baseline, else with MODEL on an exact cache."""
    from quantkit_eval import long_generation

    side, tokenizer, quantized_cache = _side(model, tokens, opening, run_in)
    if baseline is None and not quantized_cache:
        raise click.UsageError(
            "--long compares the texts of two models, or of a quantized KV cache and an exact one; add --baseline or "
            "--kv-cache"
        )
    other, _, _ = _side(baseline or model, tokens, opening.exact(same=baseline is None), run_in)
    report = long_generation(side, tokenizer, text, other, new_tokens=tokens)
    deliver(json_file, report.to_json(), lambda: print_long(report, make_console()))


def _side(path_or_id: str, tokens: int, opening: Opening, run_in: str) -> tuple[Side, Any, bool]:
    """(what writes and gives distributions, its tokenizer, whether its KV cache is quantized)."""
    from quantkit_eval import Side

    from quantkit.layers.kv_cache import cache_of

    model, tokenizer, runner = opening.run(path_or_id, tokens, run_in)
    cache = cache_of(model)
    if runner.way == "native":
        return (
            Side(runner.model, description=cache().description if cache else None),
            tokenizer,
            cache is not None,
        )
    writer = runner.model if runner.way == "graph" else None
    return Side(model, cache, writer), tokenizer, cache is not None


def print_long(report: LongReport, console: Screen) -> None:
    """For each way of writing the divergence by position, then repetition and loops."""
    for written in report.written:
        table = Table(
            "new tokens",
            "KL(baseline || model)",
            "top-1 agreement",
            "texts that differ",
            title=f"{written.way}, along the baseline's texts",
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for bucket in written.curve:
            error = "" if bucket.kl_mean_se is None else f" ± {bucket.kl_mean_se:.5f}"
            table.add_row(
                f"{bucket.first} - {bucket.last}",
                f"{bucket.kl_mean:.5f}{error}",
                f"{bucket.top1_agreement:.2%}",
                f"{bucket.parted:.0%}",
            )
        console.print(table)
        console.print(_repeated(written, report))
    console.print(f"± is one standard error, over texts{f'; {report.cache}' if report.cache else ''}")


def _repeated(written: Writing, report: LongReport) -> str:
    mean, base = (sum(each) / len(each) for each in (written.repetition, written.repetition_baseline))
    error = "" if written.repetition_difference_se is None else f" ± {written.repetition_difference_se:.2%}"
    places = ", ".join("never" if at is None else f"{at}" for at in written.first_difference)
    loops, loops_base = (
        sum(at is not None for at in each) for each in (written.loops, written.loops_baseline)
    )
    return (
        f"{report.sequences} texts of {report.new_tokens} tokens; the model's leaves the baseline's at token {places}; "
        f"repeated 4-grams: {mean:.2%}, baseline {base:.2%}, difference {written.repetition_difference:+.2%}{error}; "
        f"texts that end in a loop: {loops}, baseline {loops_base}"
    )
