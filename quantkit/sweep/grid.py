"""A sweep as it is written: a grid of recipes that differ in a few keys. Without torch.

`load_sweep` reads it from YAML, `parse_sweep` from Python data; both report every mistake at once, those of the cells'
recipes included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from quantkit.errors import RecipeError
from quantkit.paths import user_path
from quantkit.recipe.errors import problems
from quantkit.recipe.recipe import Recipe, parse_recipe
from quantkit.recipe.schemes import ALGORITHMS, TRANSFORMS, Part, Text
from quantkit.recipe.words import did_you_mean, meant_value
from quantkit.recipe.yaml import MAX_BYTES, Located, read
from quantkit.scheme import KV_PRESETS

MOST_CELLS = 400
_NAMED = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"
Name = Annotated[Text, Field(pattern=_NAMED, max_length=100)]


def _listed(value: Any) -> Any:
    """One value is short for a list of it; a list is kept as a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Values = Annotated[tuple[Any, ...], Field(strict=False, min_length=1), BeforeValidator(_listed)]


class GridPart(Part):
    """What is varied: every combination of one value from each list is a cell. A key that is left out is not varied.

    methods: "gptq", "awq" (with RTN), "awq+gptq", or {name, transforms, algorithm}. kv_cache: a preset, a mapping as in
    a recipe, or none. The others are keys of a recipe's `weights`, and its `inputs`.
    """

    methods: Values = ("rtn",)
    preset: Values | None = None
    bits: Values | None = None
    group_size: Values | None = None
    symmetric: Values | None = None
    inputs: Values | None = None
    kv_cache: Values | None = None


class CellPart(Part):
    """A cell of its own: a name, and what its recipe says beyond the sweep's `recipe`."""

    name: Name
    recipe: dict[str, Any]


class EvaluationPart(Part):
    """What every cell is measured on. tokens: at most so many of the text, in windows of `window` tokens (default: the
    shortest calibration sequence of the cells, at most 2048). text: files, folders or `hf:` names; default embedded.
    """

    tokens: Annotated[int, Field(ge=2, le=1_000_000_000)] = 16384
    window: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    text: Annotated[tuple[Text, ...], Field(strict=False), BeforeValidator(_listed)] = ()


class SweepPart(Part):
    """A sweep. recipe: what the cells have in common. context: tokens of the KV cache counted into a cell's memory.

    speed: whether prefill and decode are timed. alpha: the chance that any answer to "is A better than B?" is wrong.
    """

    name: Name = "sweep"
    model: Text | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    grid: GridPart | None = None
    cells: Annotated[tuple[CellPart, ...], Field(strict=False)] = ()
    evaluation: EvaluationPart = EvaluationPart()
    context: Annotated[int, Field(ge=1, le=100_000_000)] = 4096
    speed: bool = True
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05


@dataclass(frozen=True)
class Cell:
    """One recipe of a sweep. factors: what it differs in, as words."""

    id: str
    factors: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A sweep that was read: what it says, and its cells."""

    asked: SweepPart
    cells: tuple[Cell, ...]


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep from a YAML file; RecipeError lists every mistake, one per line."""
    file = user_path(path, RecipeError)
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_BYTES + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    return _checked(read(text, str(path)))


def parse_sweep(mapping: Mapping[str, Any]) -> Sweep:
    """Like `load_sweep`, from Python data written as in YAML."""
    return _checked(Located(dict(mapping), "sweep"))


def short_form(methods: str, options: Mapping[str, str | None], model: str | None) -> dict[str, Any]:
    """The sweep that comma-separated lists on the command line say. options: key of the grid -> its list."""
    grid: dict[str, Any] = {"methods": methods.split(",")}
    for key, text in options.items():
        if text is not None:
            values = [yaml.safe_load(each) if each.strip() else each for each in text.split(",")]
            grid[key] = [_cased(each) for each in values] if key == "kv_cache" else values
    return {"model": model, "grid": grid} if model else {"grid": grid}


def _cased(value: Any) -> Any:
    """The name of a KV preset in its own capitals."""
    upper = value.upper() if isinstance(value, str) else value
    return upper if upper in KV_PRESETS else value


def _checked(found: Located) -> Sweep:
    asked = None
    if not isinstance(found.data, dict):
        if not found.problems:
            found.problem((), "expected a mapping; the shortest sweep has a grid with a list of methods")
    elif not found.problems:
        try:
            asked = SweepPart.model_validate(found.data)
        except ValidationError as error:
            for path, message in problems(error, found.data, SweepPart, {}):
                found.problem(path, message)
    cells: list[Cell] = []
    if asked is not None:
        if asked.grid is None and not asked.cells:
            found.problem((), "has neither a grid nor cells, so there is nothing to try; give one of them")
        cells = _cells(asked, found)
    if found.problems or asked is None:
        raise RecipeError("\n".join(dict.fromkeys(found.problems)))
    return Sweep(asked, tuple(cells))


def _cells(asked: SweepPart, found: Located) -> list[Cell]:
    """Every cell whose recipe is sound; the mistakes of the others go into `found`."""
    written = [
        *_combined(asked, found),
        *((each.name, {"method": each.name}, each.recipe) for each in asked.cells),
    ]
    if len(written) > MOST_CELLS:
        found.problem(
            ("grid",), f"makes {len(written):,} cells, at most {MOST_CELLS:,} are tried; leave values out"
        )
        return []
    cells: dict[str, Cell] = {}
    for name, factors, own in written:
        if name in cells:
            found.problem(
                ("grid",), f"two cells are called {name}; leave one out, or give its method another name"
            )
            continue
        try:
            cells[name] = Cell(name, factors, parse_recipe(_merged(asked.recipe, own)))
        except RecipeError as error:
            for line in str(error).splitlines():
                found.problem(("recipe",), f"cell {name}: {line.removeprefix('recipe: ')}")
    return list(cells.values())


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with another one's values put over it, key by key."""
    merged = dict(base)
    for key, value in own.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping) and key != "algorithm"
        merged[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return merged


Written = tuple[
    str, dict[str, Any], dict[str, Any]
]  # name, factors, what the recipe says beyond the common one


def _combined(asked: SweepPart, found: Located) -> Iterator[Written]:
    """Every combination of the grid."""
    grid = asked.grid
    if grid is None:
        return
    methods = [each for n, value in enumerate(grid.methods) if (each := _method(value, n, found)) is not None]
    keys = [key for key in GridPart.model_fields if key != "methods" and getattr(grid, key) is not None]
    for values in product(*(getattr(grid, key) for key in keys)):
        for name, method in methods:
            chosen = dict(zip(keys, values, strict=True))
            weights = {
                key: chosen[key] for key in ("preset", "bits", "group_size", "symmetric") if key in chosen
            }
            own: dict[str, Any] = {"weights": weights | {"algorithm": method["algorithm"]}}
            own["transforms"] = method["transforms"]
            for key in ("inputs", "kv_cache"):
                if key in chosen and not _is_none(chosen[key]):
                    own[key] = chosen[key]
            factors = {"method": name} | {key: _word(value) for key, value in chosen.items()}
            yield _name(name, grid, chosen), factors, own


def _method(value: Any, number: int, found: Located) -> tuple[str, dict[str, Any]] | None:
    """(name, its transforms and algorithm) of one entry of `methods`; None if it is a mistake, which is noted."""
    where = ("grid", "methods", number)
    if isinstance(value, Mapping):
        extra = value.keys() - {"name", "transforms", "algorithm"}
        name = value.get("name")
        if extra or not isinstance(name, str) or not re.fullmatch(_NAMED, name):
            form = "expected {name, transforms, algorithm} with a name of letters, digits and . _ + -"
            found.problem(where, f"{form}, got {dict(value)!r}")
            return None
        transforms = value.get("transforms") or []
        return name, {"transforms": transforms, "algorithm": value.get("algorithm", "rtn")}
    parts = value.split("+") if isinstance(value, str) else []
    unknown = [part for part in parts if part not in ALGORITHMS and part not in TRANSFORMS]
    known = [*ALGORITHMS, *TRANSFORMS]
    if not parts or unknown:
        meant = did_you_mean(meant_value(unknown[0], known)) if unknown else ""
        said = unknown[0] if unknown else value
        found.problem(where, f"unknown method{meant}; known, joined by +: {', '.join(known)}, got {said!r}")
        return None
    chosen = [part for part in parts if part in ALGORITHMS]
    if len(chosen) > 1 or (chosen and parts[-1] != chosen[0]):
        found.problem(
            where, f"one algorithm may stand behind the transforms, such as awq+gptq, got {value!r}"
        )
        return None
    transforms = [part for part in parts if part in TRANSFORMS]
    return value, {"transforms": transforms, "algorithm": chosen[0] if chosen else "rtn"}


def _is_none(value: Any) -> bool:
    return value is None or value == "none"


def _word(value: Any) -> Any:
    """A value as a factor of the table: plain, or one word."""
    if _is_none(value):
        return "none"
    if isinstance(value, Mapping):
        head = value.get("preset") or value.get("number") or "custom"
        rest = [f"{key}={each}" for key, each in value.items() if key not in ("preset", "number")]
        return ",".join([str(head), *rest])
    return value


def _name(method: str, grid: GridPart, chosen: Mapping[str, Any]) -> str:
    """A cell's name: its values, those first that say the size; what is not varied is left out, but for the bits."""
    said = []
    if "preset" in chosen:
        said.append(str(chosen["preset"]).lower())
    if "bits" in chosen:
        said.append(f"w{chosen['bits']}")
    if len(grid.group_size or ()) > 1:
        said.append(
            "channel" if chosen["group_size"] in (None, "channel", -1) else f"g{chosen['group_size']}"
        )
    if len(grid.symmetric or ()) > 1:
        said.append("sym" if chosen["symmetric"] else "asym")
    said.append(method)
    for key, short in (("inputs", "a"), ("kv_cache", "kv")):
        values = getattr(grid, key) or ()
        if len(values) > 1:
            heads = [str(_word(each)).partition(",")[0] for each in values]
            word = str(_word(chosen[key]))
            head = word.partition(",")[0]
            word = head if heads.count(head) == 1 else word
            said.append(f"{short}-{word}".lower().replace(",", "-").replace("=", "-"))
    return "-".join(said)


def of_command_line(
    file: str | None, methods: str | None, options: Mapping[str, str | None], model: str | None
) -> Sweep:
    """The sweep of a file, or of lists on the command line; RecipeError if there are both or neither."""
    lists: Sequence[str] = [key for key, value in options.items() if value is not None]
    if file is not None and (lists or methods):
        raise RecipeError(
            "a file says the whole grid; leave out the lists of methods and values, or the file"
        )
    if file is not None:
        return load_sweep(file)
    if not lists and not methods:
        raise RecipeError("nothing to sweep over; give a file, or for instance --methods rtn,gptq --bits 4,3")
    return parse_sweep(short_form(methods or "rtn", options, model))
