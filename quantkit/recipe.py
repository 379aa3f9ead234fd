"""A recipe: everything that a run is asked to do, as one frozen value.

`load_recipe` reads it from YAML, `parse_recipe` from Python data; both report every mistake at once. Defaults are
filled in here and nowhere else. Three ways to write it back: `resolved()` in full, `published()` without the folders of
this machine (what a manifest stores), `identity()` what decides the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from quantkit import assets
from quantkit.algorithms.config import AlgorithmConfig
from quantkit.errors import RecipeError
from quantkit.formats import registry
from quantkit.paths import user_path
from quantkit.recipe_errors import configs_by_name, problems
from quantkit.recipe_words import did_you_mean, meant_value
from quantkit.recipe_yaml import MAX_BYTES, MAX_DEPTH, Located, apply_override, is_clean, read
from quantkit.scheme import PRESETS, Scheme, integer
from quantkit.transforms.config import TransformConfig

# Presets that bits, group_size and symmetric say in full.
_PRESETS = {
    name: scheme
    for name, scheme in PRESETS.items()
    if scheme.inputs is None and scheme.weights.number.kind == "int"
}
SCHEME_KEYS = tuple(inspect.signature(integer).parameters)  # bits, group_size, symmetric


ALGORITHMS = configs_by_name(AlgorithmConfig)
TRANSFORMS = configs_by_name(TransformConfig)


def _named(value: Any, kind: str) -> Any:
    """`gptq` is short for {name: gptq}; ValueError for a name that no config has."""
    if isinstance(value, str):
        value = {"name": value}
    name = value.get("name") if isinstance(value, Mapping) else None
    ours, others = (ALGORITHMS, TRANSFORMS) if kind == "algorithm" else (TRANSFORMS, ALGORITHMS)
    if not isinstance(name, str) or name in ours:
        return value
    known = f"known: {', '.join(map(repr, ours))}"
    elsewhere = meant_value(name, others)
    if elsewhere and not meant_value(name, ours):
        other = elsewhere.strip("`")
        said = f"{other} is an algorithm: `algorithm: {other}` in weights"
        if kind == "algorithm":
            said = f"{other} is a transform: `transforms: [{other}]`, beside an algorithm"
        raise ValueError(f"{said}; {known}, got {name!r}")
    raise ValueError(f"unknown {kind}{did_you_mean(meant_value(name, ours))}; {known}, got {name!r}")


def _clean(text: str) -> str:
    if not is_clean(text):
        raise ValueError("holds a NUL character or half of a surrogate pair; remove it")
    return text


if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[tuple(_PRESETS)]
Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_clean)]
Algorithm = Annotated[AlgorithmConfig, BeforeValidator(lambda value: _named(value, "algorithm"))]
Transform = Annotated[TransformConfig, BeforeValidator(lambda value: _named(value, "transform"))]
Bits = Annotated[int, Field(ge=2, le=8)]
GroupSize = Annotated[int, Field(ge=16)] | None
Count = Annotated[int, Field(ge=1, le=10_000_000)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _SchemePart(_Part):
    """What `weights` and a rule have in common: `preset` and `group_size: channel` are short for other values."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        name = value.get("preset")
        if isinstance(name, str) and name in _PRESETS:
            base = _PRESETS[value.pop("preset")].weights
            value = {key: getattr(base, key) for key in SCHEME_KEYS} | value
        if value.get("group_size") in ("channel", -1):
            value["group_size"] = None
        return value


class Weights(_SchemePart):
    """What happens to every linear of the decoder blocks. A preset fills bits, group_size and symmetric."""

    algorithm: Algorithm
    preset: PresetName | None = Field(None, exclude=True)
    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = True

    @property
    def scheme(self) -> Scheme:
        return Scheme(integer(**{key: getattr(self, key) for key in SCHEME_KEYS}))


class Rule(_SchemePart):
    """An exception for the modules whose name fits the glob `match`: skip them, or replace these keys of `weights`.

    Only keys that were written count; of several fitting rules the last alone is used.
    """

    match: Annotated[Text, Field(max_length=200)]
    skip: bool = False
    algorithm: Algorithm | None = None
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
    """One source of text: a file, a dataset folder or a dataset id; `samples` windows are cut from it."""

    source: Text
    config: Text | None = None
    split: Text | None = None
    field: Text | None = None
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


def _known_format(name: str) -> str:
    if name not in registry.names():
        meant = did_you_mean(meant_value(name, registry.names()))
        raise ValueError(f"unknown format{meant}; known: {', '.join(registry.names())}, got {name!r}")
    return name


Format = Annotated[str, AfterValidator(_known_format)]


class Output(_Part):
    """allow_split_fusion: let {q, k, v} or {gate, up} of a block differ; inference engines fuse these."""

    format: Format = registry.DEFAULT
    allow_split_fusion: bool = False


class Recipe(_Part):
    """What a run does. model: a folder or a hub id[@revision]; None = the embedded default."""

    model: Text | None = None
    weights: Weights
    transforms: Annotated[tuple[Transform, ...], Field(strict=False)] = ()
    rules: Annotated[tuple[Rule, ...], Field(strict=False)] = ()
    calibration: Calibration = Calibration()
    output: Output = Output()

    @field_validator("weights", mode="before")
    @classmethod
    def _weights_are_a_mapping(cls, value: Any) -> Any:
        if value == "none":
            raise ValueError(
                "a recipe without weights is not available yet; give a mapping with an algorithm"
            )
        if not isinstance(value, str):
            return value
        preset = (meant_value(value, _PRESETS) or "").strip("`")
        algorithm = (meant_value(value, ALGORITHMS) or "").strip("`")
        example = f"{{preset: {preset or 'W4A16'}, algorithm: {algorithm or 'gptq'}}}"
        raise ValueError(f"expected a mapping, for instance `weights: {example}`, got {value!r}")

    @field_validator("transforms", mode="before")
    @classmethod
    def _none_is_an_empty_list(cls, value: Any) -> Any:
        return () if value is None else value

    def resolved(self) -> dict[str, Any]:
        """The recipe as JSON-able data with every default filled in; parse_recipe() of it gives an equal recipe."""
        data = self.model_dump(mode="json")
        data["rules"] = [rule.model_dump(mode="json", exclude_unset=True) for rule in self.rules]
        for written, rule in zip(data["rules"], self.rules, strict=True):
            if rule.algorithm is not None:
                written["algorithm"] = rule.algorithm.model_dump(mode="json")
        return data

    def published(self) -> dict[str, Any]:
        """`resolved()` for a file that others read: names instead of paths on this machine."""
        data = self.resolved()
        data["model"] = _without_folders(self.model)
        for source in data["calibration"]["data"]:
            source["source"] = _without_folders(source["source"])
        return data

    def identity(self) -> dict[str, Any]:
        """What decides the result beside the model, the text and the code, which have digests of their own.

        So the same model or text under another path is the same run.
        """
        data = self.resolved()
        del data["calibration"]["data"]
        return data | {"model": None}


def _without_folders(written: str | None) -> str | None:
    """The last part of a path; what is no path on this machine, such as a hub id, stays as it is."""
    if written is None:
        return None
    try:
        path = user_path(written, RecipeError)
        return path.resolve().name or written if path.is_absolute() or path.exists() else written
    except (RecipeError, OSError):
        return written


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by name, with `overrides` like "weights.bits=3" applied.

    RecipeError lists every mistake, one per line, as `file:line: yaml.path: message`.
    """
    path = user_path(path_or_name, RecipeError)
    if not path.is_file():
        named = assets.recipe_path(str(path_or_name))
        if named is None:
            known = assets.recipe_names()
            raise RecipeError(
                f"no recipe {str(path_or_name)!r}: it is neither a file nor a shipped recipe"
                f"{did_you_mean(meant_value(str(path_or_name), known))}; shipped: {', '.join(known)}"
            )
        path = named
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    return _validate(read(text, str(path_or_name)), overrides)


def parse_recipe(mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Like `load_recipe`, from Python data written as in YAML."""
    return _validate(Located(_plain(mapping), "recipe"), overrides)


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy with dicts and lists only, so that an override never changes the caller's data."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"recipe: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    return [_plain(item, depth + 1) for item in value] if isinstance(value, list | tuple) else value


def _validate(found: Located, overrides: Sequence[str]) -> Recipe:
    """The recipe that was read, overrides applied; RecipeError with every mistake."""
    if not found.problems:
        for override in overrides:
            apply_override(found, override)
    recipe = None
    if found.data is None and not found.problems:
        found.problem((), "empty; the shortest recipe is `weights: {preset: W4A16, algorithm: gptq}`")
    elif not isinstance(found.data, dict):
        if not found.problems:
            found.problem((), f"expected a mapping of keys, got {type(found.data).__name__}")
    else:
        try:
            recipe = Recipe.model_validate(found.data)
        except ValidationError as error:
            for path, message in problems(error, found.data, Recipe, ALGORITHMS | TRANSFORMS):
                found.problem(path, message)
    if found.problems or recipe is None:
        raise RecipeError("\n".join(dict.fromkeys(found.problems)))
    return recipe
