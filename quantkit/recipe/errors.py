"""pydantic's errors about a recipe, in the words of a recipe: the path as it was written, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from quantkit.recipe.words import did_you_mean, meant_key, meant_value
from quantkit.recipe.yaml import Path

_LONGEST = 500  # characters of one message

Configs = Mapping[str, type[BaseModel]]


def configs_by_name(union: Any) -> dict[str, type[BaseModel]]:
    """The config classes of a union, by the one value that their field `name` takes."""
    return {get_args(config.model_fields["name"].annotation)[0]: config for config in _members(union)}


def problems(
    error: ValidationError, data: Any, root: type[BaseModel], configs: Configs
) -> Iterator[tuple[Path, str]]:
    """(path, message) of every mistake. data: what was validated as `root`. configs: members of the unions in it."""
    parts = _parts(root)
    for one in error.errors(include_url=False):
        path = _written_path(data, one["loc"], configs)
        yield path, _message(dict(one), path, parts, configs)


def _members(union: Any) -> tuple[Any, ...]:
    """The types of `A | B`, of Annotated[A | B, ...], or of A alone; without None."""
    while get_origin(union) is Annotated:
        union = get_args(union)[0]
    return tuple(each for each in get_args(union) or (union,) if each is not type(None))


def _parts(model: type[BaseModel], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], type[BaseModel]]:
    """Every part of a recipe by its path, "*" for the number of a list item."""
    found = {path: model}
    for name, field in model.model_fields.items():
        inner, here = field.annotation, (*path, name)
        if get_origin(inner) is tuple:
            inner, here = get_args(inner)[0], (*here, "*")
        members = _members(inner)
        if len(members) == 1 and isinstance(members[0], type) and issubclass(members[0], BaseModel):
            found |= _parts(members[0], here)
    return found


def _written_path(data: Any, loc: tuple[str | int, ...], configs: Configs) -> Path:
    """pydantic's location without the names of union members that it puts in, which nobody wrote."""
    path: list[str | int] = []
    for key in loc:
        inside = key in data if isinstance(data, dict) else isinstance(data, list) and isinstance(key, int)
        if inside:
            data = data[key]
        elif key in configs or not isinstance(data, dict):
            continue
        path.append(key)
    return tuple(path)


def _message(
    error: Mapping[str, Any],
    path: Path,
    parts: Mapping[tuple[str, ...], type[BaseModel]],
    configs: Configs,
) -> str:
    kind, message = error["type"], str(error["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        tag = str(error["loc"][-2]) if len(error["loc"]) > 1 else ""
        place = tuple("*" if isinstance(key, int) else key for key in path[:-1])
        return _unknown_key(path, configs.get(tag) or parts.get(place))
    if kind == "missing":
        return "missing; it must be given"
    if kind == "union_tag_not_found":
        return "the key `name` is missing"
    if kind == "value_error":
        return message
    if kind == "tuple_type":
        message = "expected a list"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "expected a mapping of keys"
    elif kind == "literal_error":
        expected = error["ctx"]["expected"].replace(" or ", ", ").split(", ")
        message += did_you_mean(meant_value(error["input"], [choice.strip("'") for choice in expected]))
    return f"{message}, got {error['input']!r}"[:_LONGEST]


def _unknown_key(path: Path, part: type[BaseModel] | None) -> str:
    """path: that of the key. part: what it was written in, if that is known."""
    known = tuple(part.model_fields) if part else ()
    meant = meant_key(str(path[-1]), known)
    listed = f"; known here: {', '.join(known)}" if known else ""
    return f"unknown key{did_you_mean(meant)}{listed}"
