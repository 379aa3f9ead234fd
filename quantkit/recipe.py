"""A recipe: what a run does, as one frozen value; read from YAML with every error told at once.

Defaults are filled in here and nowhere else; `Recipe.resolved()` is what a manifest stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantkit import assets
from quantkit.algorithms.config import AlgorithmConfig, GptqConfig, RtnConfig
from quantkit.errors import RecipeError
from quantkit.recipe_yaml import MAX_BYTES, Located, apply_override, read
from quantkit.scheme import PRESETS, Scheme, integer
from quantkit.transforms.config import AwqConfig, TransformConfig

NOT_YET = ("activations", "kv_cache")
SCHEME_KEYS = ("bits", "group_size", "symmetric")

PresetName = Literal[tuple(PRESETS)]
Bits = Annotated[int, Field(ge=2, le=8)]
GroupSize = Annotated[int, Field(ge=16)] | None
Count = Annotated[int, Field(ge=1, le=10_000_000)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _SchemePart(_Part):
    """The short forms shared by `weights` and `rules`."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        name = value.get("preset")
        if isinstance(name, str) and name in PRESETS:
            base = PRESETS[value.pop("preset")].weights
            value = {key: getattr(base, key) for key in SCHEME_KEYS} | value
        if value.get("group_size") in ("channel", -1):
            value["group_size"] = None
        if isinstance(value.get("algorithm"), str):
            value["algorithm"] = {"name": value["algorithm"]}
        return value


class Weights(_SchemePart):
    """The default for every linear of the decoder blocks. A preset fills bits, group_size and symmetric."""

    algorithm: AlgorithmConfig
    preset: PresetName | None = Field(None, exclude=True)
    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = True

    @property
    def scheme(self) -> Scheme:
        return Scheme(integer(self.bits, self.group_size, self.symmetric))


class Rule(_SchemePart):
    """For the modules whose name fits the glob `match`: skip them, or replace these keys of `weights`.

    Only keys that were written count; of several fitting rules the last alone is used.
    """

    match: Annotated[str, Field(min_length=1, max_length=200)]
    skip: bool = False
    algorithm: AlgorithmConfig | None = None
    preset: PresetName | None = Field(None, exclude=True)
    bits: Bits | None = None
    group_size: GroupSize = None
    symmetric: bool | None = None

    @model_validator(mode="after")
    def _skip_stands_alone(self) -> Self:
        extra = self.model_fields_set - {"match", "skip"}
        if self.skip and extra:
            raise ValueError(f"skip: true leaves nothing for {', '.join(sorted(extra))}; remove one of them")
        if any(key in extra and getattr(self, key) is None for key in ("algorithm", "bits", "symmetric")):
            raise ValueError(
                "algorithm, bits and symmetric need a value; leave the key out to keep that of weights"
            )
        return self

    def fits(self, name: str) -> bool:
        """Whether the module name fits; `*` also spans dots, case counts."""
        return fnmatchcase(name, self.match)

    def apply(self, weights: Weights) -> tuple[Scheme, AlgorithmConfig]:
        """The scheme and algorithm of a module under this rule."""
        chosen = {key: getattr(self, key) for key in SCHEME_KEYS if key in self.model_fields_set}
        scheme = weights.model_copy(update=chosen).scheme
        return scheme, self.algorithm or weights.algorithm


class DataSource(_Part):
    """A text or JSONL file, or a dataset (id or folder); `samples` windows are cut from it."""

    source: Annotated[str, Field(min_length=1)]
    config: str | None = None
    split: str | None = None
    field: str | None = None
    samples: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        """ "PATH" and "PATH:N" are short for {source: PATH} and {source: PATH, samples: N}."""
        if not isinstance(value, str):
            return value
        head, colon, tail = value.rpartition(":")
        if colon and head and tail.isdecimal() and len(tail) < 10:
            return {"source": head, "samples": int(tail)}
        return {"source": value}


class Calibration(_Part):
    """`samples` windows of `sequence_length` tokens; no data means the embedded text."""

    data: Annotated[tuple[DataSource, ...], Field(strict=False)] = ()
    samples: Count = 128
    sequence_length: Annotated[int, Field(ge=2, le=1_000_000)] = 512
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @field_validator("data", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, str | Mapping) else value

    @model_validator(mode="after")
    def _counts_sum_up(self) -> Self:
        given = [source.samples for source in self.data if source.samples is not None]
        shared = len(self.data) - len(given)
        if self.data and not shared and sum(given) != self.samples:
            raise ValueError(
                f"the sources' counts sum to {sum(given)}, not to samples: {self.samples}; make them equal"
            )
        if shared and sum(given) + shared > self.samples:
            raise ValueError(
                f"the given counts sum to {sum(given)} of samples: {self.samples}, which leaves less than "
                f"one for each of the {shared} sources without a count"
            )
        return self


class Output(_Part):
    """allow_split_fusion: let {q, k, v} or {gate, up} of a block differ; inference engines fuse these."""

    format: Literal["compressed-tensors"] = "compressed-tensors"
    allow_split_fusion: bool = False


class Recipe(_Part):
    """model: a folder or a hub id[@revision]; None = the embedded default."""

    model: Annotated[str, Field(min_length=1)] | None = None
    weights: Weights
    transforms: Annotated[tuple[TransformConfig, ...], Field(strict=False)] = ()
    rules: Annotated[tuple[Rule, ...], Field(strict=False)] = ()
    calibration: Calibration = Calibration()
    output: Output = Output()

    @field_validator("transforms", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return () if value is None else value
        return tuple({"name": item} if isinstance(item, str) else item for item in value)

    def resolved(self) -> dict[str, Any]:
        """Plain JSON-able data with every default filled in; parse_recipe() of it gives an equal recipe."""
        data = self.model_dump(mode="json")
        data["rules"] = [rule.model_dump(mode="json", exclude_unset=True) for rule in self.rules]
        for written, rule in zip(data["rules"], self.rules, strict=True):
            if rule.algorithm is not None:
                written["algorithm"] = rule.algorithm.model_dump(mode="json")
        return data


_NAMED: dict[str, type[BaseModel]] = {"rtn": RtnConfig, "gptq": GptqConfig, "awq": AwqConfig}
_PARTS: dict[tuple[str, ...], type[BaseModel]] = {
    (): Recipe,
    ("weights",): Weights,
    ("rules", "*"): Rule,
    ("calibration",): Calibration,
    ("calibration", "data", "*"): DataSource,
    ("output",): Output,
    ("transforms", "*"): AwqConfig,
}


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by name, with `overrides` like "weights.bits=3" applied.

    RecipeError lists every problem, one per line, as `file:line: yaml.path: message`.
    """
    path = Path(path_or_name)
    if not path.is_file():
        named = assets.recipe_path(str(path_or_name))
        if named is None:
            known = ", ".join(assets.recipe_names())
            raise RecipeError(
                f"no recipe {str(path_or_name)!r}: not a file, and the shipped ones are {known}"
            )
        path = named
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    found = read(text, str(path_or_name))
    if not found.problems:
        for override in overrides:
            apply_override(found, override)
    return _validate(found)


def parse_recipe(mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The same from plain Python data, written as in YAML."""
    found = Located(_plain(mapping), "recipe")
    for override in overrides:
        apply_override(found, override)
    return _validate(found)


def _plain(value: Any) -> Any:
    """A copy with dicts and lists only, so that an override never changes the caller's data."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _validate(found: Located) -> Recipe:
    recipe = None
    if found.data is None and not found.problems:
        found.problem((), "empty; the least recipe is `weights: {preset: W4A16, algorithm: gptq}`")
    elif not isinstance(found.data, dict):
        if not found.problems:
            found.problem((), f"expected a mapping of keys, got {type(found.data).__name__}")
    else:
        try:
            recipe = Recipe.model_validate(found.data)
        except ValidationError as error:
            for one in error.errors(include_url=False):
                path = _yaml_path(found.data, one["loc"])
                found.problem(path, _message(one, path))
    if found.problems or recipe is None:
        raise RecipeError("\n".join(dict.fromkeys(found.problems)))
    return recipe


def _yaml_path(data: Any, loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """pydantic's location without the union tags it puts in, which nobody wrote."""
    path: list[str | int] = []
    for key in loc:
        inside = key in data if isinstance(data, dict) else isinstance(data, list) and isinstance(key, int)
        if inside:
            data = data[key]
        elif key in _NAMED or not isinstance(data, dict):
            continue
        path.append(key)
    return tuple(path)


def _message(error: Mapping[str, Any], path: tuple[str | int, ...]) -> str:
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        if len(path) == 1 and path[0] in NOT_YET:
            return "not available yet in this version; remove the key"
        tag = error["loc"][-2] if len(error["loc"]) > 1 else None
        part = _NAMED.get(tag) or _PARTS.get(tuple("*" if isinstance(p, int) else p for p in path[:-1]))
        known = f"; known here: {', '.join(part.model_fields)}" if part else ""
        return f"unknown key{known}"
    if kind == "missing":
        return "missing; it must be given"
    if kind == "tuple_type":
        message = "expected a list"
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "expected a mapping of keys"
    elif kind == "union_tag_invalid":
        message = f"unknown name; known: {error['ctx']['expected_tags']}"
    elif kind == "union_tag_not_found":
        return "the key `name` is missing"
    elif kind == "value_error":
        return message
    got = error["input"]
    return f"{message}, got {got['name'] if kind == 'union_tag_invalid' else got!r}"[:500]
