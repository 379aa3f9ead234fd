"""`quantkit kernels`: what is built, what this machine can run, and what would run for each scheme."""

from __future__ import annotations

import click

from quantkit.cli.output import json_option, make_console, write_report


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
    """Which kernels are built and found, and what runs each scheme, with the reason."""
    from rich.table import Table

    from quantkit.bench.kernels.inventory import inventory

    n, _, k = shape.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise click.BadParameter(f"{shape!r} is not NxK, such as 4096x4096", param_hint="--shape")
    if check:
        _compare_all(int(n), int(k))
    found = inventory(int(n), int(k), backend)
    write_report(json_file, found)
    console = make_console()
    for part, says in found["built"].items():
        console.print(f"{part}: {says}", highlight=False, markup=False)
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
    console.print(f"\nweight [{n}, {k}]", highlight=False)
    console.print(table)


def _compare_all(n: int, k: int) -> None:
    """Have "auto" compare the kernels of every scheme now, which it would do when it first needs one."""
    import quantkit_kernels
    import torch

    from quantkit.bench.kernels.inventory import BITS, GROUPS

    for bits in BITS:
        for group in GROUPS:
            for symmetric in (True, False):
                if k % (group or k) == 0:
                    spec = quantkit_kernels.Spec.integer(bits, group, symmetric, n, k)
                    quantkit_kernels.select(spec, "cuda", "auto", torch.bfloat16)
