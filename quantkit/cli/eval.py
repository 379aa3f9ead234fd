"""`quantkit eval`: perplexity of any causal LM, and how far it is from a baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from quantkit_eval.report import Report
from rich.table import Table

from quantkit import assets
from quantkit.cli.evaluation import evaluation_footer, evaluation_rows
from quantkit.cli.explaining import Explaining, print_explanation
from quantkit.cli.opening import kv_cache_option, open_model, opening_options, resolve
from quantkit.cli.output import Screen, deliver, json_option, make_console
from quantkit.device import launch
from quantkit.errors import ModelError

if TYPE_CHECKING:
    from quantkit_eval.explanation import Explanation
    from quantkit_eval.long_texts import LongGeneration


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
    "--long-generation",
    is_flag=True,
    help="Instead, let the model write four texts with its KV cache, and compare it with an exact one by position.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    help="Of each text of --long-generation.",
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
    long_generation: bool,
    new_tokens: int,
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
    them. The baseline always has an exact cache.
    """
    from quantkit_eval import evaluate

    from quantkit.calibration.distributed import joined
    from quantkit.layers.kv_cache import cache_of

    why = Explaining(model, baseline) if explain else None
    if long_generation and launch().size > 1:
        raise click.UsageError("--long-generation runs in one process; start it without torchrun")
    with joined(device, "start the evaluation again") as ranks:
        candidate, tokenizer = open_model(model, device, dtype, backend, compute, verify, kv_cache)
        text = list(texts) or [str(assets.evaluation_text())]
        if long_generation:
            _long_generation(candidate, tokenizer, text, new_tokens, json_file)
            return
        reference, its_tokenizer = (
            open_model(baseline, device, dtype, verify=verify, kv_cache="exact") if baseline else (None, None)
        )
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
            seen=why and why.seen,
        )
    found = why and why.explained(candidate, reference, tokenizer)
    if launch().rank:
        return  # the first process reports
    told = report.to_json() | {"model": model, "baseline": baseline}
    told |= {"explanation": found.to_json()} if found else {}
    deliver(json_file, told, lambda: print_evaluation(report, make_console(), found))


def _long_generation(
    model: Any, tokenizer: Any, text: list[str], new_tokens: int, json_file: str | None
) -> None:
    """Measure long texts, and print or write the report."""
    from quantkit_eval import long_generation

    from quantkit.layers.kv_cache import cache_of

    cache = cache_of(model)
    if cache is None:
        raise click.UsageError(
            "--long-generation compares a quantized KV cache with an exact one; add --kv-cache"
        )
    report = long_generation(model, tokenizer, text, cache, new_tokens=new_tokens)
    deliver(json_file, report.to_json(), lambda: print_long_generation(report, make_console()))


def print_long_generation(report: LongGeneration, console: Screen) -> None:
    """The curve of the divergence, then what the texts repeat."""
    table = Table("new tokens", "KL(exact || cache)", "top-1 agreement", title=report.cache)
    for column in table.columns[1:]:
        column.justify = "right"
    for bucket in report.curve:
        error = "" if bucket.kl_mean_se is None else f" ± {bucket.kl_mean_se:.5f}"
        table.add_row(
            f"{bucket.first} - {bucket.last}", f"{bucket.kl_mean:.5f}{error}", f"{bucket.top1_agreement:.2%}"
        )
    console.print(table)
    console.print(
        f"{report.sequences} texts of {report.new_tokens} tokens; repeated 4-grams: {report.repetition:.2%}, with an "
        f"exact cache {report.repetition_exact:.2%}; ± is one standard error, over texts"
    )


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
