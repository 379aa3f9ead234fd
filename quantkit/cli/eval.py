"""`quantkit eval`: perplexity of any causal LM, and how far it is from a baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from quantkit_eval.report import Report
from rich.table import Table

from quantkit import assets
from quantkit.cli.eval_long import compare_long
from quantkit.cli.eval_tasks import TASK_BATCH, ask_tasks, task_options
from quantkit.cli.evaluation import evaluation_footer, evaluation_rows
from quantkit.cli.explaining import Explaining, print_explanation
from quantkit.cli.opening import Opening, kv_cache_option, opening_options, resolve
from quantkit.cli.output import Screen, deliver, json_option, make_console
from quantkit.device import launch
from quantkit.errors import ModelError

if TYPE_CHECKING:
    from quantkit_eval.explanation import Explanation


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
@kv_cache_option
@click.option(
    "--long",
    type=click.IntRange(1),
    metavar="N",
    help="Instead, let both models write texts of N tokens, and compare them by position.",
)
@task_options
@click.option(
    "--run-in",
    type=click.Choice(["auto", "native", "transformers"]),
    default="auto",
    show_default=True,
    help="What runs --tasks and --long.",
)
@click.option(
    "--explain",
    is_flag=True,
    help="With --baseline: show the worst tokens, and restore one layer after the other to see what each costs.",
)
@opening_options
@json_option
def command(
    model: str,
    baseline: str | None,
    texts: tuple[str, ...],
    context: int | None,
    stride: int | None,
    max_tokens: int | None,
    kv_cache: str | None,
    long: int | None,
    tasks: tuple[str, ...],
    include_path: tuple[str, ...],
    limit: int | None,
    fewshot: int | None,
    chat: bool,
    batch_size: int | None,
    run_in: str,
    explain: bool,
    backend: str,
    compute: str,
    verify: bool,
    device: str,
    dtype: str,
    json_file: str | None,
) -> None:
    """Measure MODEL (a folder or hub id): perplexity, and with a baseline KL and agreement.

    A model with a quantized KV cache is measured as it decodes: every token sees the earlier ones as the cache holds
    them. The baseline always has an exact cache. With --tasks, both answer tasks of lm-eval instead, and are compared
    item by item; the baseline may then be a report that --json wrote. With --long they write long texts.
    """
    opening = Opening(device, dtype, backend, compute, verify, kv_cache)
    sources = list(texts) or [str(assets.evaluation_text())]
    windows = {"--context": context, "--stride": stride, "--max-tokens": max_tokens, "--explain": explain}
    chosen = {"--include-path": include_path, "--limit": limit, "--fewshot": fewshot, "--chat": chat}
    chosen |= {"--batch-size": batch_size}
    if (tasks or long) and launch().size > 1:
        raise click.UsageError("--tasks and --long run in one process; start them without torchrun")
    if tasks:
        _only("--tasks", windows | {"--text": texts, "--long": long})
        asked = {"tasks": tasks, "include_path": include_path, "limit": limit, "fewshot": fewshot}
        asked |= {"chat_template": chat, "batch_size": batch_size or TASK_BATCH}
        ask_tasks(model, baseline, asked, opening, run_in, json_file)
        return
    if long:
        _only("--long", windows | chosen)
        compare_long(model, baseline, sources, long, opening, run_in, json_file)
        return
    _only("an evaluation on text", chosen | {"--run-in": None if run_in == "auto" else run_in})
    _on_text(model, baseline, sources, (context, stride, max_tokens), explain, opening, json_file)


def _only(kind: str, others: dict[str, Any]) -> None:
    """UsageError for options that were given and belong to another kind of evaluation."""
    given = [
        name for name, value in others.items() if value is not None and value is not False and value != ()
    ]
    if given:
        raise click.UsageError(f"{' and '.join(given)} cannot be combined with {kind}; leave it out")


def _on_text(
    model: str,
    baseline: str | None,
    text: list[str],
    windows: tuple[int | None, int | None, int | None],
    explain: bool,
    opening: Opening,
    json_file: str | None,
) -> None:
    """Measure on the windows of a text; windows: context, stride, max_tokens."""
    from quantkit_eval import evaluate

    from quantkit.calibration.distributed import joined
    from quantkit.layers.kv_cache import cache_of

    context, stride, max_tokens = windows
    why = Explaining(model, baseline) if explain else None
    with joined(opening.device, "start the evaluation again") as ranks:
        candidate, tokenizer = opening.open(model)
        reference, its_tokenizer = opening.exact(same=False).open(baseline) if baseline else (None, None)
        report = evaluate(
            candidate,
            tokenizer,
            text=text,
            baseline=reference,
            baseline_tokenizer=its_tokenizer,
            context=context,
            stride=stride,
            max_tokens=max_tokens,
            baseline_cache=_cache(baseline) if baseline else None,
            cache=cache_of(candidate),
            group=ranks if ranks.size > 1 else None,
            seen=why.seen if why else None,
        )
    found = why.explained(candidate, reference, tokenizer) if why else None
    if launch().rank:
        return  # the first process reports
    told = report.to_json() | {"model": model, "baseline": baseline}
    told |= {"explanation": found.to_json()} if found else {}
    deliver(json_file, told, lambda: print_evaluation(report, make_console(), found))


def _cache(baseline: str) -> Any:
    """What the baseline computed in earlier evaluations; None if it is no checkpoint of a kind that is quantized."""
    from quantkit.models.headers import read_checkpoint
    from quantkit.models.source import Source
    from quantkit.pipeline.cache import evaluation_cache

    try:
        return evaluation_cache(Source(read_checkpoint(resolve(baseline))).digest())
    except ModelError:
        return None


def print_evaluation(report: Report, console: Screen, explanation: Explanation | None = None) -> None:
    """The table of an evaluation; without a baseline it has one column of numbers. Then what explains it."""
    names = ("baseline", "model")
    shown = names if report.original else names[1:]
    table = Table("", *shown)
    for column in table.columns[1:]:
        column.justify = "right"
    for what, *values in evaluation_rows(report, names):
        table.add_row(what, *values[-len(shown) :])
    console.print(table)
    console.print(evaluation_footer(report))
    if explanation is not None:
        print_explanation(explanation, console)
