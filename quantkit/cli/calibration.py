"""`quantkit calibration`: the calibration text of a recipe as the model will see it, and what is wrong with it."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

import click
from rich.table import Column, Table

from quantkit.cli.opening import device_option, threads_option
from quantkit.cli.output import Screen, deliver, json_option, make_console

if TYPE_CHECKING:
    from quantkit.pipeline.doctor import CalibrationReport

SHOWN, LAST = 64, 16  # tokens of the window that are printed, from its beginning and its end
SCRIPTS = 12  # lines


@click.command("calibration")
@click.argument("recipe")
@click.option(
    "--model",
    metavar="PATH_OR_ID",
    help="Whose tokenizer is used; default: the recipe's, or the embedded one.",
)
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a key: calibration.samples=64."
)
@click.option(
    "--eval-text",
    "eval_texts",
    multiple=True,
    metavar="FILE",
    help="The text of the evaluation: a file, dataset folder or hf:name; repeatable; default: the embedded text.",
)
@click.option(
    "--experts/--no-experts",
    default=None,
    help="Count the tokens per expert of a mixture, which runs the model; default: if its weights take at most 1 GiB.",
)
@device_option
@threads_option
@json_option
def command(
    recipe: str,
    model: str | None,
    overrides: tuple[str, ...],
    eval_texts: tuple[str, ...],
    experts: bool | None,
    device: str,
    json_file: str | None,
) -> None:
    """Look at the calibration text of RECIPE (a file or a shipped name) as the model will see it.

    Only the tokenizer is read, but for --experts. Warnings say what to do; they do not change the exit code.
    """
    from quantkit.pipeline.doctor import examine_calibration

    found = examine_calibration(recipe, model, overrides, eval_texts, experts, device)
    deliver(json_file, found.to_json(), lambda: print_calibration(found, make_console()))


def print_calibration(found: CalibrationReport, console: Screen) -> None:
    """Sources, one window, the vocabulary, experts, then the warnings."""
    windows = f"{found.samples} windows of {found.sequence_length} tokens, seed {found.seed}"
    console.print(
        f"{windows}{', from the embedded text' if found.embedded else ''}; sha256 {found.digest[:16]}"
    )
    console.print(_sources(found))
    console.print(_tokens(found), soft_wrap=True)
    console.print(f"first window: {_window(found.window)}", soft_wrap=True)
    console.print(_scripts(found))
    shared = found.overlap
    console.print(
        f"shared with the evaluation text ({', '.join(found.evaluation)}): "
        + (f"{shared.windows} windows, {shared.share:.2%} of it" if shared.windows else "nothing"),
        soft_wrap=True,
    )
    if found.experts:
        console.print(_experts(found))
    if found.experts_left:
        console.print(f"tokens per expert were not counted: {found.experts_left}", soft_wrap=True)
    for warning in found.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    if not found.warnings:
        console.print("nothing looks wrong")


def _sources(found: CalibrationReport) -> Table:
    right = ("documents", "chats", "tokens", "windows", "used", "unknown", "special")
    lengths = ("min", "median", "p95", "max", "longer than a window")
    table = Table(
        Column("source", overflow="fold"),
        *(Column(name, justify="right") for name in (*right, *lengths, "equal", "nearly", "repeated lines")),
    )
    for each in found.sources:
        tokens, twice = each.lengths, each.duplicates
        table.add_row(
            each.name,
            f"{each.documents:,}{'+' if each.cut else ''}",
            f"{each.chats:,}",
            f"{each.tokens:,}{'+' if each.cut else ''}",
            str(each.windows),
            f"{each.used:.0%}",
            f"{each.unknown:.2%}",
            f"{each.special:.2%}",
            *(f"{value:,.0f}" for value in (tokens.min, tokens.median, tokens.p95, tokens.max)),
            f"{tokens.longer:.0%}",
            str(twice.exact),
            str(twice.near),
            f"{twice.repeated_lines:.1%}",
        )
    return table


def _tokens(found: CalibrationReport) -> str:
    """BOS, EOS and the template, in words."""
    known = found.tokenizer
    first = "begins every window" if known.bos_first else "is not put before windows"
    bos = f"BOS {known.bos} {first}, {known.bos_inside} inside" if known.bos else "no BOS"
    eos = f"EOS {known.eos}: {known.eos_inside} inside" if known.eos else "no EOS"
    chats = sum(source.chats for source in found.sources)
    template = (
        f"a chat template, which rendered {chats:,} documents" if known.template else "no chat template"
    )
    return f"tokenizer: {known.vocabulary:,} tokens; {bos}; {eos}; {template}; documents are joined without EOS of ours"


def _window(tokens: list[str]) -> str:
    """The tokens at both ends, with bars between."""
    whole = len(tokens) <= SHOWN + LAST
    head, tail = (tokens, []) if whole else (tokens[:SHOWN], ["...", *tokens[-LAST:]])
    return "|".join([*head, *tail])


def _scripts(found: CalibrationReport) -> Table:
    total = max(1, sum(each.tokens for each in found.scripts))
    right = ("tokens", "of the vocabulary", "seen", "seen of them")
    title = f"{found.covered:.1%} of the vocabulary is in the windows"
    table = Table("vocabulary", *(Column(name, justify="right") for name in right), title=title)
    for each in found.scripts[:SCRIPTS]:
        share, seen = f"{each.tokens / total:.1%}", f"{each.seen / each.tokens:.1%}"
        table.add_row(each.name, f"{each.tokens:,}", share, f"{each.seen:,}", seen)
    rest = found.scripts[SCRIPTS:]
    if rest:
        tokens, touched = sum(each.tokens for each in rest), sum(each.seen for each in rest)
        shares = f"{tokens / total:.1%}", f"{touched:,}", f"{touched / tokens:.1%}"
        table.add_row(f"{len(rest)} other scripts", f"{tokens:,}", *shares)
    return table


def _experts(found: CalibrationReport) -> Table:
    names = ("experts", "min", "median", "max", "without any", "fewer than needed", "needed")
    table = Table(
        Column("tokens per expert", overflow="fold"), *(Column(name, justify="right") for name in names)
    )
    for layer in found.experts or []:
        counts = layer.tokens
        few = sum(0 < count < layer.needed for count in counts)
        values = (len(counts), min(counts), median(counts), max(counts), counts.count(0), few, layer.needed)
        table.add_row(layer.name, *(f"{value:,.0f}" for value in values))
    return table
