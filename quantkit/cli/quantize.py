"""`quantkit quantize`: the main job, and its table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.table import Table

from quantkit.cli.evaluation import evaluation_footer, evaluation_rows
from quantkit.cli.opening import threads_option
from quantkit.cli.output import Screen, deliver, json_option, make_console, page_option, size
from quantkit.cli.progress import make_progress
from quantkit.device import launch

if TYPE_CHECKING:
    from quantkit.checkpoint.records import Size
    from quantkit.pipeline.report import RunReport


@click.command("quantize")
@click.argument("recipe")
@click.option("--model", metavar="PATH_OR_ID", help="Folder or hub id[@revision]; default: the recipe's.")
@click.option("--output", metavar="DIR", help="Default: ./out/<model>-<recipe>.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a key: weights.bits=3.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:n]")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Continue an interrupted run.")
@click.option("--no-eval", is_flag=True, help="Do not measure perplexity and KL at the end.")
@click.option("--eval-tokens", type=click.IntRange(2), metavar="N", help="Measure on exactly N tokens.")
@click.option(
    "--eval-text",
    "eval_texts",
    multiple=True,
    metavar="FILE",
    help="Measure on this file, dataset folder or hf:name; repeatable; default: the embedded text.",
)
@threads_option
@page_option
@json_option
def command(
    recipe: str,
    model: str | None,
    output: str | None,
    overrides: tuple[str, ...],
    device: str,
    resume: bool,
    no_eval: bool,
    eval_tokens: int | None,
    eval_texts: tuple[str, ...],
    page_file: str | None,
    json_file: str | None,
) -> None:
    """Quantize a model as RECIPE (a file or a shipped name) says, verify it, measure it."""
    if no_eval and (eval_tokens or eval_texts):
        raise click.UsageError("--no-eval measures nothing; leave out --eval-tokens and --eval-text")
    progress = make_progress()
    from quantkit.pipeline.quantize import quantize

    try:
        result = quantize(
            recipe,
            model=model,
            output=output,
            overrides=overrides,
            device=device,
            resume=resume,
            evaluate=not no_eval,
            progress=progress,
            eval_tokens=eval_tokens,
            eval_text=eval_texts or None,
        )
    finally:
        progress.finish()
    if launch().rank:
        return  # the first process reports
    deliver(json_file, result.report.to_json(), lambda: print_report(result.report, make_console()))
    if page_file is not None:
        from quantkit.report.page import write_page

        write_page([result.output], page_file)
    if result.failed:
        click.get_current_context().exit(1)


def print_report(report: RunReport, console: Screen) -> None:
    """The table of a run, then its notes and where the files are."""
    table = Table("", "original", "quantized", title=None)
    for column in table.columns[1:]:
        column.justify = "right"
    evaluation = report.evaluation
    rows = evaluation_rows(evaluation) if evaluation else [("perplexity", "not evaluated", "not evaluated")]
    for row in (*_size_rows(report.size), *rows):
        table.add_row(*row)
    console.print(table)
    if evaluation:
        console.print(evaluation_footer(evaluation))
    console.print(_cost(report))
    for search in report.searches:
        console.print(str(search))
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(f"files: {report.output}", soft_wrap=True)


def _size_rows(sizes: Size) -> list[tuple[str, str, str]]:
    before, after = sizes.original_bytes, sizes.quantized_bytes
    linear, whole = sizes.original_linear_bits_per_weight, sizes.model_bits_per_weight
    rows = [("size", size(before), f"{size(after)} ({after / before:.1%})")]
    if sizes.linear_bits_per_weight:  # 0: the recipe leaves the weights as they are
        of_linears = f"{linear:.2f}" if linear else "", f"{sizes.linear_bits_per_weight:.3f}"
        rows.append(("bits per weight, quantized linears", *of_linears))
    return [*rows, ("bits per weight, whole model", f"{whole * before / after:.2f}", f"{whole:.3f}")]


def _cost(report: RunReport) -> str:
    """Time and memory of the run that made the files; a copied folder may have lost them."""
    from quantkit.checkpoint.manifest import ALLOCATION

    seconds = report.seconds
    if "total" not in seconds:
        return "time and memory of the run are not recorded here"
    names = {"search": "search", "calibrate_quantize": "calibrate and quantize"}
    names |= {"verify": "verify", "evaluate": "evaluate"}
    steps = ", ".join(f"{text} {seconds[key]:.1f} s" for key, text in names.items() if key in seconds)
    resumed = f"; {report.resumed_blocks} blocks were already done" if report.resumed_blocks else ""
    memory = "" if report.peak_rss_bytes is None else f"; peak memory: {size(report.peak_rss_bytes)}"
    phase = "evaluate" if "evaluate" in report.peak_bytes else "quantize"
    if memory and (predicted := report.predicted_bytes.get(phase)):
        searched = (report.output / ALLOCATION).exists()  # what a search measures is in no prediction
        memory += f" (predicted{' without the search' if searched else ''}: at most {size(predicted)})"
    if memory and report.budget and "ram" in report.budget:
        memory += f" of a budget of {size(report.budget['ram'])}"
    return f"time: {seconds['total']:.1f} s ({steps}){resumed}{memory}"
