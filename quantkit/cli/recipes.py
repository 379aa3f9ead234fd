"""`quantkit recipes`: the shipped recipes, one line each, and what loads their results."""

from __future__ import annotations

import click
from rich.table import Table

from quantkit import assets
from quantkit.checkpoint.loaders import Loader, loaders
from quantkit.cli.output import make_console
from quantkit.recipe.recipe import load_recipe
from quantkit.scheme import Scheme


@click.command("recipes")
def command() -> None:
    """List the shipped recipes and what loads their results; use a recipe by its name.

    `yes` means without options. Of the checkpoint of a particular model `quantkit inspect` says more: the code of some
    families reads the weights of its linears itself.
    """
    others = [loader.name for loader in _loaders("w4a16-rtn")]
    table = Table("recipe", "what it does", *others, box=None, padding=(0, 2, 0, 0))
    conditions: list[str] = []
    for name in assets.recipe_names():
        table.add_row(name, _purpose(name), *(_verdict(loader, conditions) for loader in _loaders(name)))
    console = make_console()
    console.print(table)
    for number, condition in enumerate(conditions, 1):
        console.print(f"({number}) {condition}")


def _loaders(recipe: str) -> list[Loader]:
    """What loads the result of a recipe beside quantkit, as far as its scheme decides."""
    read = load_recipe(recipe)
    weights = read.weights
    inputs = None if read.inputs is None else read.inputs.grid
    schemes = {} if weights is None else {"linear": Scheme(weights.scheme.weights, inputs)}
    found = loaders("", schemes, None if read.kv_cache is None else read.kv_cache.scheme)
    return [loader for loader in found if loader.name != "quantkit"]


def _verdict(loader: Loader, conditions: list[str]) -> str:
    """ "yes", or the number of the condition, which is added to `conditions` when it is new."""
    condition = loader.needs if loader.loads else f"no: {loader.how}"
    if condition is None:
        return "yes"
    condition = condition.partition(", for ")[0]
    if condition not in conditions:
        conditions.append(condition)
    return f"({conditions.index(condition) + 1})"


def _purpose(name: str) -> str:
    """What a shipped recipe does: its second line."""
    path = assets.recipe_path(name)
    assert path is not None
    return path.read_text(encoding="utf-8").splitlines()[1].removeprefix("#").strip()
