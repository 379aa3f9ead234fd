"""`quantkit kernels`: list what is built, what this machine can run, and what would run for each scheme."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import click

from quantkit.cli.output import Screen, deliver, json_option, make_console


@click.command("kernels")
@click.option(
    "--shape", metavar="NxK", default="4096x4096", show_default=True, help="Of the weight asked about."
)
@click.option("--backend", metavar="NAME", help="Ask about this backend. Default: what would run by itself.")
@click.option(
    "--check", is_flag=True, help="First compare the GPU kernels with the reference, which compiles them all."
)
@json_option
def command(shape: str, backend: str | None, check: bool, json_file: str | None) -> None:
    """List the kernels that are built, and which backend runs each scheme here, with the reason. Times nothing."""
    from quantkit.bench.kernels.inventory import inventory

    n, k = _rows_and_columns(shape)
    if check:
        _compare_all(n, k)
    found = inventory(n, k, backend)
    deliver(json_file, found, lambda: print_inventory(found, (n, k), make_console()))


def _rows_and_columns(shape: str) -> tuple[int, int]:
    """Read "4096x11008" as (4096, 11008)."""
    found = re.fullmatch(r"([1-9]\d{0,7})x([1-9]\d{0,7})", shape, re.ASCII)
    if found is None:
        raise click.BadParameter(
            f"the shape must be NxK, such as 4096x4096, got {shape!r}", param_hint="--shape"
        )
    return int(found[1]), int(found[2])


def print_inventory(found: dict[str, Any], shape: tuple[int, int], console: Screen) -> None:
    """What is built, a line per part, then the tables of integer schemes and of other number formats."""
    from rich.table import Table

    for part, says in found["built"].items():
        console.print(f"{part}: {says}")
    table = Table("bits", "group", "zero point", "device", "runs on", "why", box=None, padding=(0, 2, 0, 0))
    for row in found["schemes"]:
        table.add_row(
            ", ".join(map(str, row["bits"])),
            ", ".join(row["groups"]),
            row["zero_point"],
            row["device"],
            row["runs"] or "-",
            row["why"],
        )
    others = Table("weights", "device", "runs on", "why", box=None, padding=(0, 2, 0, 0))
    for row in found["formats"]:
        others.add_row(row["format"], row["device"], row["runs"] or "-", row["why"])
    console.print()
    console.print(f"weight [{shape[0]}, {shape[1]}]")
    console.print(table)
    console.print()
    console.print(others)


def _compare_all(n: int, k: int) -> None:
    """Have "auto" compare the kernels of every scheme now, which it would do when it first needs one."""
    import quantkit_kernels
    import torch

    from quantkit.bench.kernels.inventory import BITS, FORMATS, GROUPS

    for bits in BITS:
        for group in GROUPS:
            for symmetric in (True, False):
                if k % (group or k) == 0:
                    spec = quantkit_kernels.Spec.integer(bits, group, symmetric, n, k)
                    quantkit_kernels.select(spec, "cuda", "auto", torch.bfloat16)
    for number, bits, group, inputs in FORMATS.values():
        if k % (group or k) == 0:
            spec = quantkit_kernels.Spec(number, bits, group or k, True, n, k, inputs)
            with contextlib.suppress(quantkit_kernels.BackendMissing):
                quantkit_kernels.select(spec, "cuda", "auto", torch.bfloat16)
