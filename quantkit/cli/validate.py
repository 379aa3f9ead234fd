"""`quantkit validate`: every error of a recipe; with a model also the plan, from headers only."""

from __future__ import annotations

import click
import yaml
from rich.console import Console
from rich.table import Column, Table

from quantkit.cli.output import make_console
from quantkit.plan import Plan, validate


@click.command("validate")
@click.argument("recipe")
@click.option("--model", metavar="PATH", help="Also show what the recipe does to each linear of this model.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a key: weights.bits=3.")
def command(recipe: str, model: str | None, overrides: tuple[str, ...]) -> None:
    """Check RECIPE (a file or a shipped name) and print it with every default filled in."""
    checked, plan = validate(recipe, model, overrides)
    click.echo(yaml.safe_dump(checked.resolved(), sort_keys=False), nl=False)
    if plan is not None:
        print_plan(plan, make_console())
    click.echo(f"{recipe}: valid")


def print_plan(plan: Plan, console: Console) -> None:
    table = Table(
        Column("linear", overflow="fold"),
        "shape",
        "scheme",
        "algorithm",
        title=f"{plan.n_blocks} blocks in {plan.blocks_prefix}",
    )
    for layer in plan.layers:
        n, k = layer.shape
        table.add_row(layer.name, f"{n} x {k}", str(layer.scheme), layer.algorithm.name)
    for name, reason in plan.skipped:
        table.add_row(name, "", "as it is", reason)
    console.print(table)
