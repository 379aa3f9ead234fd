"""`quantkit validate`: every error of a recipe; with a model also the plan, from headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import click
import yaml
from rich.table import Column, Table

from quantkit.cli.output import Screen, make_console, size
from quantkit.cli.terminal import say
from quantkit.models import families
from quantkit.models.headers import Headers
from quantkit.plan import Plan, starred
from quantkit.predict.sizes import Prediction
from quantkit.validation import validate


@click.command("validate")
@click.argument("recipe")
@click.option("--model", metavar="PATH", help="Also show what the recipe does to each linear of this model.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a key: weights.bits=3.")
def command(recipe: str, model: str | None, overrides: tuple[str, ...]) -> None:
    """Check RECIPE (a file or a shipped name) and print it with every default filled in."""
    found = validate(recipe, model, overrides)
    say(yaml.safe_dump(found.recipe.resolved(), sort_keys=False), nl=False)
    if found.plan is not None and found.prediction is not None:
        console = make_console()
        if found.recipe.model_free and found.headers is not None:
            print_found(found.plan, found.headers, console)
        else:
            print_plan(found.plan, console)
        print_prediction(found.prediction, console)
        print_engines(found.engines, console)
        if found.search:
            console.print(found.search)
        if found.outlook:
            console.print(found.outlook)
    say(f"{recipe}: valid")


def print_plan(plan: Plan, console: Screen) -> None:
    table = Table(
        Column("linear", overflow="fold"),
        "shape",
        "scheme",
        "algorithm",
        title=f"{plan.n_blocks} blocks in {plan.blocks_prefix}",
    )
    rows: Counter[tuple[str, str, str, str]] = Counter()
    for layer in plan.layers:
        n, k = layer.shape
        expert = families.EXPERT_TENSOR.search(layer.name)  # a mixture has thousands of them
        name = starred(layer.name) if expert else layer.name
        rows[name, f"{n} x {k}", str(layer.scheme), layer.algorithm.name] += 1
    for (name, *rest), count in rows.items():
        table.add_row(f"{name} ({count})" if count > 1 else name, *rest)
    for name, reason in plan.skipped:
        table.add_row(name, "", "as it is", reason)
    console.print(table)


def print_found(plan: Plan, headers: Headers, console: Screen) -> None:
    """What names and shapes say about a checkpoint, before anything is written: alike tensors in one row."""
    table = Table(
        Column("tensors", overflow="fold"),
        Column("count", justify="right"),
        "shape",
        "scheme",
        Column("why", overflow="fold"),
        title=f"{plan.n_blocks} blocks in {plan.blocks_prefix or headers.path.name}, by names and shapes",
    )
    rows: Counter[tuple[str, str, str, str]] = Counter()
    for layer in plan.layers:
        n, k = layer.shape
        rows[starred(layer.name), f"{n} x {k}", str(layer.scheme), layer.algorithm.name] += 1
    for name, reason in plan.skipped:
        info = headers.tensors.get(f"{name}.weight") or headers.tensors[name]
        rows[starred(name), " x ".join(map(str, info.shape)), "as it is", reason] += 1
    for (name, shape, scheme, reason), count in rows.items():
        table.add_row(name, str(count), shape, scheme, reason)
    vectors = sum(len(info.shape) < 2 for info in headers.tensors.values())
    if vectors:
        table.add_row("(norms, biases and other vectors)", str(vectors), "", "as it is", "no matrix")
    console.print(table)


def print_prediction(found: Prediction, console: Screen) -> None:
    """What a run will need; memory as an upper estimate, for the CPU."""
    console.print(
        f"output: about {size(found.output)}; free disk needed: {size(found.disk)}; memory on the CPU: at most "
        f"{size(found.memory)} to quantize, about {size(found.evaluation)} to evaluate",
        highlight=False,
        soft_wrap=True,
    )


def print_engines(engines: Iterable[tuple[bool, str]], console: Screen) -> None:
    """Who will run the result, and what each would refuse."""
    for runs, said in engines:
        console.print(f"{'yes' if runs else 'no':<3}  {said}", highlight=False, soft_wrap=True)
