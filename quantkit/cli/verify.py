"""`quantkit verify`: whether a checkpoint's files are as written, and its recorded inputs give its bytes again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.table import Column, Table

from quantkit.cli.opening import resolve
from quantkit.cli.output import Screen, deliver, json_option, make_console
from quantkit.cli.progress import make_progress
from quantkit.device import launch

if TYPE_CHECKING:
    from quantkit.pipeline.reproduce import Change, Reproduction


@click.command("verify")
@click.argument("folder", metavar="DIR")
@click.option(
    "--layers",
    default="3",
    show_default=True,
    metavar="N|GLOB",
    help="Decoder blocks to make again: so many, evenly spaced, or those with a tensor or module that fits.",
)
@click.option("--model", metavar="PATH_OR_ID", help="The source; default: where the run read it.")
@click.option(
    "--data",
    multiple=True,
    metavar="FILE",
    help="A calibration text, in the recipe's order; repeatable; default: where the run read it.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="CPU threads. Default: as many as the run had.",
)
@json_option
def command(
    folder: str,
    layers: str,
    model: str | None,
    data: tuple[str, ...],
    threads: int | None,
    json_file: str | None,
) -> None:
    """Make some blocks of a quantized checkpoint again from its recorded inputs, and compare them byte by byte.

    The files in DIR, the source and the calibration text are compared with the sha256s in quantkit.json too. Exit code
    0: all is identical; 1: something differs.
    """
    if launch().size > 1:
        raise click.UsageError("verify runs in one process; start it without torchrun")
    progress = make_progress()
    from quantkit.pipeline.reproduce import reproduce

    asked = int(layers) if layers.isdecimal() else layers
    try:
        found = reproduce(resolve(folder), asked, model, data, threads, progress)
    finally:
        progress.finish()
    deliver(json_file, found.to_json(), lambda: print_reproduction(found, make_console()))
    if not found.identical:
        click.get_current_context().exit(1)


def print_reproduction(found: Reproduction, console: Screen) -> None:
    """What was compared and what differs, then the verdict in one line."""
    for name in found.changed:
        console.print(f"not the file that was written: {name}", soft_wrap=True)
    for change in found.inputs:
        console.print(f"not the recorded {change.name}: {_then_now(change)}", soft_wrap=True)
    if found.parts:
        console.print(_table(found))
    apart = any(part.differences for part in found.parts)
    if apart:
        first = next(part.differences[0] for part in found.parts if part.differences)
        console.print(f"first differing tensor: {first}", soft_wrap=True)
    if found.environment:
        harmless = found.parts and not apart
        console.print(f"not as when it was made{', without consequence here' if harmless else ''}:")
        for change in found.environment:
            console.print(f"  {change.name}: {_then_now(change)}", soft_wrap=True)
    console.print(_verdict(found), soft_wrap=True)


def _then_now(change: Change) -> str:
    return f"{'not recorded' if change.then is None else change.then} -> {change.now}"


def _table(found: Reproduction) -> Table:
    """One line per part that was made again."""
    table = Table(
        Column("part", overflow="fold"),
        Column("tensors", justify="right"),
        "result",
        Column("sha256 of the file", no_wrap=True),
        Column("seconds", justify="right"),
    )
    for part in found.parts:
        count = len(part.differences)
        codes = [each for each in part.differences if each.why == "codes"]
        said = "identical" if not count else f"{count} differ"
        if codes:
            differing, total = (
                sum(getattr(each, key) or 0 for each in codes) for key in ("differing", "total")
            )
            said += f"; {differing:,} of {total:,} codes in them"
        table.add_row(part.name, str(part.tensors), said, part.found[:16], f"{part.seconds:.1f}")
    return table


def _verdict(found: Reproduction) -> str:
    files = f"{found.files} files"
    if found.identical:
        made = f"{len(found.parts)} parts of it made again are the same bytes"
        return f"{found.path}: identical: its {files} are as written, and {made}"
    if not found.parts:
        return f"{found.path}: different; no block was made again, as that would say nothing"
    wrong = sum(bool(part.differences) for part in found.parts)
    files = f"{len(found.changed)} of its {files}"
    return f"{found.path}: different: {files}, {wrong} of {len(found.parts)} parts made again"
