"""An ordinary recipe, with a rule for every linear, that says what a search has chosen; without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import yaml

from quantkit.allocation.groups import Allocatable, Group
from quantkit.plan import Plan
from quantkit.recipe.recipe import Recipe, parse_recipe
from quantkit.recipe.schemes import UNUSUAL
from quantkit.scheme import Grid

HEAD = "# {command}\n# Written by a search for {searched}; it makes the same files without searching.\n"


def explicit_recipe(
    recipe: Recipe, plan: Plan, found: Allocatable, chosen: Sequence[int], cache: str | None = None
) -> Recipe:
    """The recipe without its search, and with rules that give each group its scheme. plan: of the recipe itself.

    chosen: the number of each group's scheme. cache: the KV cache that was chosen; None: the recipe's.
    """
    data = recipe.resolved()
    data.pop("gate", None)
    data.pop("target", None)
    if recipe.target is not None and recipe.target.unsearched is not None:
        data["target"] = recipe.target.unsearched.model_dump(mode="json", exclude_none=True)
    if cache == "none":
        data.pop("kv_cache", None)
    elif cache is not None:
        data["kv_cache"] = cache
    for group, number in zip(found.groups, chosen, strict=True):
        scheme = group.schemes[number]
        if any(layer.scheme != scheme for layer in group.layers):
            data["rules"] += _rules(recipe, plan, group, scheme.weights)
    return parse_recipe(data)


def _rules(recipe: Recipe, plan: Plan, group: Group, grid: Grid) -> Iterator[dict[str, Any]]:
    """The rules that give a group its grid, and keep what else the recipe's rules say of its linears."""
    kept = [_kept(recipe, layer.name) for layer in group.layers]
    pattern = f"{group.name}.*"
    names = {layer.name for layer in group.layers}
    alike = all(each == kept[0] for each in kept)
    fitting = {layer.name for layer in plan.layers if fnmatchcase(layer.name, pattern)}
    if group.experts and alike and fitting == names:
        yield {"match": pattern} | kept[0] | _keys(grid)
        return
    for layer, more in zip(group.layers, kept, strict=True):
        yield {"match": layer.name} | more | _keys(grid)


def _kept(recipe: Recipe, name: str) -> dict[str, Any]:
    """What the rule that counts for a linear says beside how its weight is stored."""
    number = next((n for n in reversed(range(len(recipe.rules))) if recipe.rules[n].fits(name)), None)
    if number is None:
        return {}
    written: Mapping[str, Any] = recipe.resolved()["rules"][number]
    return {key: value for key, value in written.items() if key in ("algorithm", "inputs")}


def _keys(grid: Grid) -> dict[str, Any]:
    """The keys of a rule that say a grid."""
    keys: dict[str, Any] = {
        "bits": grid.bits,
        "group_size": grid.group_size or "channel",
        "symmetric": grid.symmetric,
    }
    if grid.number.kind == "int" and grid.granularity in ("channel", "group"):
        return keys
    more = {"number": grid.number.name, "granularity": grid.granularity, "scale": grid.scale}
    return keys | {key: value for key, value in more.items() if value is not None}


def to_yaml(recipe: Recipe, command: str, searched: str) -> str:
    """The text of a recipe's file. command: how to run it. searched: the keys that were searched for."""
    data = recipe.resolved()
    for rule in data["rules"]:  # what `bits` in a rule means by itself
        for key in UNUSUAL:
            if rule.get(key, key) is None:
                del rule[key]
    return HEAD.format(command=command, searched=searched) + yaml.safe_dump(data, sort_keys=False, width=110)
