"""`quantkit diff`: how two checkpoints differ, and with --kl how far apart their predictions are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
from rich.table import Column, Table

from quantkit import assets
from quantkit.cli.evaluation import evaluation_footer, evaluation_rows
from quantkit.cli.opening import device_option, dtype_option, open_model, resolve, threads_option
from quantkit.cli.output import Screen, deliver, json_option, make_console, size

if TYPE_CHECKING:
    from quantkit_eval.report import Report

    from quantkit.pipeline.diff import Diff, Side

SHOWN = 8  # tensors and files that are named


@click.command("diff")
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@click.option(
    "--kl", is_flag=True, help="Also run both: KL(A || B) and the paired difference of NLL on one text."
)
@click.option(
    "--text",
    "texts",
    metavar="FILE",
    multiple=True,
    help="Of --kl: a file, a dataset folder or hf:name[:config[:split]]; repeatable; default: the embedded text.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(2),
    help="Of --kl; default: 65,536, or until the KL is known to 2 %.",
)
@click.option("--exit-code", "strict", is_flag=True, help="End with exit code 1 if they differ.")
@device_option
@dtype_option
@threads_option
@json_option
def command(
    one: str,
    other: str,
    kl: bool,
    texts: tuple[str, ...],
    max_tokens: int | None,
    strict: bool,
    device: str,
    dtype: str,
    json_file: str | None,
) -> None:
    """Compare checkpoints A and B (folders or hub ids): recipes, schemes, sizes, recorded errors, bytes.

    They may be of quantkit, of another tool that it reads, or not quantized. Exit code 0, also if they differ.
    """
    if not kl and (texts or max_tokens):
        raise click.UsageError("--text and --max-tokens belong to --kl; add it")
    from quantkit.pipeline.diff import diff_checkpoints

    found = diff_checkpoints(resolve(one), resolve(other))
    if kl:
        found = replace(found, evaluation=_evaluated(one, other, list(texts), max_tokens, device, dtype))
    deliver(json_file, found.to_json(), lambda: print_diff(found, make_console()))
    if strict and not found.identical:
        click.get_current_context().exit(1)


def _evaluated(
    one: str, other: str, texts: list[str], max_tokens: int | None, device: str, dtype: str
) -> Report:
    """B against A on the same tokens; A with an exact KV cache, as every baseline."""
    from quantkit_eval import evaluate

    from quantkit.layers.kv_cache import cache_of
    from quantkit.pipeline.evaluation import KL_ERROR, TOKENS

    baseline, its_tokenizer = open_model(one, device, dtype, kv_cache="exact")
    candidate, tokenizer = open_model(other, device, dtype)
    report: Report = evaluate(
        candidate,
        tokenizer,
        text=texts or [str(assets.evaluation_text())],
        baseline=baseline,
        baseline_tokenizer=its_tokenizer,
        max_tokens=max_tokens or TOKENS,
        kl_error=None if max_tokens else KL_ERROR,
        cache=cache_of(candidate),
    )
    return report


def print_diff(found: Diff, console: Screen) -> None:
    """Both sides, then what differs: recipe, kinds of layers, tensors, files, predictions."""
    for letter, side in (("A", found.one), ("B", found.other)):
        console.print(f"{letter}: {_side(side)}", soft_wrap=True)
    if found.recipe is None:
        console.print("recipe: quantkit has not made both, so what was asked for is not compared")
    for key in found.recipe or ():
        console.print(f"{key.key}: {_value(key.one)} -> {_value(key.other)}", soft_wrap=True)
    if found.identical:
        console.print(f"identical: {found.tensors} tensors and all files are the same")
    else:
        console.print(_layers(found))
        console.print(_tensors(found), soft_wrap=True)
        for each in (*found.differences[:SHOWN], *found.files[:SHOWN]):
            told = (
                str(each).replace("only in the first", "only in A").replace("only in the second", "only in B")
            )
            console.print(f"  {told}", soft_wrap=True)
        left = len(found.differences[SHOWN:]) + len(found.files[SHOWN:])
        if left:
            console.print(f"  ... and {left} more (--json has all)")
    if found.evaluation is not None:
        _print_evaluation(found.evaluation, console)


def _side(side: Side) -> str:
    made = "made by quantkit" if side.made else "not recorded how it was made"
    cache = f"; KV cache {side.kv_cache}" if side.kv_cache else ""
    bits = f"{side.bits_per_weight:.3f} bits per weight"
    return f"{side.path}: {side.format or 'not quantized'}, {size(side.bytes)}, {bits}{cache}; {made}"


def _value(value: Any) -> str:
    return "-" if value is None else str(value)


def _layers(found: Diff) -> Table:
    """One line per kind of layer; kinds that are alike in both are left out where others are not."""
    right = ("size A", "size B", "weight error A", "weight error B")
    table = Table(
        Column("layers", overflow="fold"),
        "scheme A",
        "scheme B",
        *(Column(x, justify="right") for x in right),
    )
    kinds = found.kinds
    apart = [kind for kind in kinds if len({*kind.schemes}) > 1 or len({*kind.errors}) > 1]
    for kind in apart or kinds:
        errors = ("" if error is None else f"{error:.2e}" for error in kind.errors)
        sizes = (size(each) for each in kind.bytes)
        table.add_row(f"{kind.count} {kind.name}", *(each or "-" for each in kind.schemes), *sizes, *errors)
    same = sum(kind.count for kind in kinds) - sum(kind.count for kind in apart)
    if apart and same:
        table.add_row(f"{same} others", "the same", "", "", "", "", "")
    return table


def _tensors(found: Diff) -> str:
    """How many tensors are the same, and how many are not, in words."""
    apart = found.differences
    alone = {side: sum(each.why == f"only in the {side}" for each in apart) for side in ("first", "second")}
    changed = len(apart) - sum(alone.values())
    said = f"tensors: {found.tensors - len(apart)} have the same bytes, {changed} differ"
    said += "".join(
        f", {count} only in {letter}" for letter, count in zip("AB", alone.values(), strict=True) if count
    )
    codes = [each for each in apart if each.why == "codes"]
    if codes:
        differing, total = (sum(getattr(each, key) or 0 for each in codes) for key in ("differing", "total"))
        said += f"; {differing:,} of {total:,} codes ({differing / total:.2%}) of the same scheme differ"
    return f"{said}; {len(found.files)} other files differ"


def _print_evaluation(evaluation: Report, console: Screen) -> None:
    table = Table("", *(Column(name, justify="right") for name in "AB"))
    for row in evaluation_rows(evaluation, ("A", "B")):
        table.add_row(*row)
    console.print(table)
    console.print(evaluation_footer(evaluation))
