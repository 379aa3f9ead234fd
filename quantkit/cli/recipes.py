"""`quantkit recipes`: the shipped recipes, one line each."""

from __future__ import annotations

import click
from rich.table import Table

from quantkit import assets
from quantkit.cli.output import make_console


@click.command("recipes")
def command() -> None:
    """List the shipped recipes; use one by its name."""
    table = Table("recipe", "what it does", box=None, padding=(0, 2, 0, 0))
    for name in assets.recipe_names():
        lines = assets.recipe_path(name).read_text(encoding="utf-8").splitlines()
        table.add_row(name, lines[1].removeprefix("#").strip())
    make_console().print(table)
