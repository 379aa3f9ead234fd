"""`quantkit eval`: perplexity of any causal LM, and how far it is from a baseline."""

from __future__ import annotations

from typing import Any

import click
from quantkit_eval.report import Report
from rich.table import Table

from quantkit import assets
from quantkit.cli.evaluation import evaluation_footer, evaluation_rows
from quantkit.cli.opening import open_model, opening_options, resolve
from quantkit.cli.output import Screen, deliver, json_option, make_console
from quantkit.errors import ModelError


@click.command("eval")
@click.argument("model")
@click.option("--baseline", metavar="MODEL", help="Compare with this model on the same tokens.")
@click.option(
    "--text",
    "texts",
    metavar="FILE",
    multiple=True,
    help="A file, a dataset folder or hf:name[:config[:split]]; repeatable; default: the embedded text.",
)
@click.option("--context", type=click.IntRange(2), help="Tokens per window; default: min(2048, the model's).")
@click.option("--stride", type=click.IntRange(1), help="Default: the context.")
@click.option("--max-tokens", type=click.IntRange(2), help="Stop after so many tokens.")
@opening_options
@json_option
def command(
    model: str,
    baseline: str | None,
    texts: tuple[str, ...],
    context: int | None,
    stride: int | None,
    max_tokens: int | None,
    backend: str,
    compute: str,
    verify: bool,
    device: str,
    dtype: str,
    json_file: str | None,
) -> None:
    """Measure MODEL (a folder or hub id): perplexity, and with a baseline KL and agreement."""
    from quantkit_eval import evaluate

    candidate, tokenizer = open_model(model, device, dtype, backend, compute, verify)
    reference, its_tokenizer = (
        open_model(baseline, device, dtype, verify=verify) if baseline else (None, None)
    )
    report = evaluate(
        candidate,
        tokenizer,
        text=list(texts) or [str(assets.evaluation_text())],
        baseline=reference,
        baseline_tokenizer=its_tokenizer,
        context=context,
        stride=stride,
        max_tokens=max_tokens,
        baseline_cache=_cache(baseline) if baseline else None,
    )
    deliver(json_file, report.to_json(), lambda: print_evaluation(report, make_console()))


def _cache(baseline: str) -> Any:
    """What the baseline computed in earlier evaluations; None if it is no checkpoint of a kind that is quantized."""
    from quantkit.models.headers import read_checkpoint
    from quantkit.models.source import Source
    from quantkit.pipeline.cache import evaluation_cache

    try:
        return evaluation_cache(Source(read_checkpoint(resolve(baseline))).digest())
    except ModelError:
        return None


def print_evaluation(report: Report, console: Screen) -> None:
    """The table of an evaluation; without a baseline it has one column of numbers."""
    names = ("baseline", "model")
    shown = names if report.original else names[1:]
    table = Table("", *shown)
    for column in table.columns[1:]:
        column.justify = "right"
    for what, *values in evaluation_rows(report, names):
        table.add_row(what, *values[-len(shown) :])
    console.print(table)
    console.print(evaluation_footer(report))
