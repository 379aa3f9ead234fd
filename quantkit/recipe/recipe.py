"""A recipe: everything that a run is asked to do, as one frozen value.

`load_recipe` reads it from YAML, `parse_recipe` from Python data; both report every mistake at once. Defaults are
filled in here and nowhere else. Three ways to write it back: `resolved()` in full, `published()` without the folders of
this machine (what a manifest stores), `identity()` what decides the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from quantkit import assets
from quantkit.algorithms.config import AlgorithmConfig
from quantkit.errors import RecipeError
from quantkit.formats import registry
from quantkit.paths import user_path
from quantkit.recipe.budget import BudgetPart
from quantkit.recipe.errors import problems
from quantkit.recipe.schemes import (
    ALGORITHMS,
    TRANSFORMS,
    UNUSUAL,
    WEIGHT_KEYS,
    ExpertsPart,
    Inputs,
    KVCache,
    MaybeInputs,
    Part,
    Rule,
    Text,
    Weights,
    named,
    none_is_none,
    scheme_of,
)
from quantkit.recipe.target import GatePart, TargetPart
from quantkit.recipe.words import did_you_mean, meant_value
from quantkit.recipe.yaml import MAX_BYTES, MAX_DEPTH, Located, apply_override, read
from quantkit.scheme import PRESETS
from quantkit.transforms.config import TransformConfig

Transform = Annotated[TransformConfig, BeforeValidator(lambda value: named(value, "transform"))]
Count = Annotated[int, Field(ge=1, le=10_000_000)]


_INSTEAD = "use algorithm: rtn with inputs as they are or rounded by token, or remove that key"


class DataSource(Part):
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


class Calibration(Part):
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


class Output(Part):
    """allow_split_fusion: let {q, k, v} or {gate, up} of a block differ; inference engines fuse these."""

    format: Format = registry.DEFAULT
    allow_split_fusion: bool = False


class Recipe(Part):
    """What a run does. model: a folder or a hub id[@revision]; None = the embedded default.

    weights: None leaves them as they are. inputs: of the quantized linears, None: as the model has them. kv_cache: None
    keeps it exact. model_free: from tensors to tensors by their names, without a model class and without text. experts:
    how those of a mixture are calibrated. target: what must be able to run the result, and how large it may be. budget:
    the most that the run may use of the machine. gate: what its evaluation must show.
    """

    model: Text | None = None
    weights: Weights | None
    inputs: MaybeInputs = None
    kv_cache: KVCache | None = None
    transforms: Annotated[tuple[Transform, ...], Field(strict=False)] = ()
    rules: Annotated[tuple[Rule, ...], Field(strict=False)] = ()
    model_free: bool = False
    calibration: Calibration = Calibration()
    experts: ExpertsPart | None = None
    target: TargetPart | None = None
    budget: BudgetPart | None = None
    gate: GatePart | None = None
    output: Output = Output()

    @model_validator(mode="before")
    @classmethod
    def _preset_says_inputs(cls, value: Any) -> Any:
        """A preset of the weights says the inputs too, unless the recipe does."""
        weights = value.get("weights") if isinstance(value, Mapping) else None
        name = weights.get("preset") if isinstance(weights, Mapping) else None
        if isinstance(name, str) and name in PRESETS and "inputs" not in value:
            grid = PRESETS[name].inputs
            return value if grid is None else {**value, "inputs": Inputs.written(grid)}
        return value

    @field_validator("weights", mode="before")
    @classmethod
    def _weights_are_a_mapping(cls, value: Any) -> Any:
        if not isinstance(value, str) or value == "none":
            return none_is_none(value)
        preset = (meant_value(value, PRESETS) or "").strip("`")
        algorithm = (meant_value(value, ALGORITHMS) or "").strip("`")
        example = f"{{preset: {preset or 'W4A16'}, algorithm: {algorithm or 'gptq'}}}"
        raise ValueError(f"expected a mapping, for instance `weights: {example}`, got {value!r}")

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.weights is None:
            given = {"inputs": self.inputs, "transforms": self.transforms, "rules": self.rules}
            useless = [key for key, part in given.items() if part]
            if useless:
                raise ValueError(f"weights: none leaves nothing for {', '.join(useless)}; remove them")
            if self.kv_cache is None:
                raise ValueError("weights: none leaves only the KV cache to quantize; give a kv_cache")
        else:
            _refuse_unstorable(self, self.weights)
            _refuse_mixed_streams(self, self.weights)
        if self.kv_cache is not None:
            why = registry.unstorable_cache(self.output.format, self.kv_cache.scheme)
            if why:
                raise ValueError(why)
        return self

    def text_for(self) -> dict[tuple[str | int, ...], str]:
        """Place of every key that needs calibration text -> what it is."""
        found: dict[tuple[str | int, ...], str] = {
            ("transforms", number): f"the transform {each.name}"
            for number, each in enumerate(self.transforms)
        }
        if self.weights is not None and self.weights.algorithm.needs:
            found["weights", "algorithm"] = _described(self.weights.algorithm)
        if self.inputs is not None and not self.inputs.dynamic:
            found["inputs",] = "a calibrated scale of inputs"
        for number, rule in enumerate(self.rules):
            if rule.algorithm is not None and rule.algorithm.needs:
                found["rules", number, "algorithm"] = _described(rule.algorithm)
            if rule.inputs is not None and not rule.inputs.dynamic:
                found["rules", number, "inputs"] = "a calibrated scale of inputs"
        for key in self.searched:
            found[tuple(key.split("."))] = "a search of bits"
        if self.kv_cache is not None and not self.kv_cache.scheme.dynamic:
            found["kv_cache",] = "a calibrated scale of the cache"
        return found

    @property
    def says_no_text(self) -> str | None:
        """The key that says that there is no calibration text, as written; None: there is some."""
        if self.model_free:
            return "model_free: true"
        none = self.weights is not None and self.weights.calibration is not None
        return "weights.calibration: none" if none else None

    @property
    def searched(self) -> tuple[str, ...]:
        """The keys that ask for a search of bits, as written; none: the recipe says all itself."""
        goal = None if self.target is None else self.target.goal
        return (*(() if goal is None else (f"target.{goal}",)), *(() if self.gate is None else ("gate",)))

    @model_validator(mode="after")
    def _search_has_weights(self) -> Self:
        if self.searched and (self.weights is None or self.model_free):
            why = "weights: none has none" if self.weights is None else "model_free: true measures nothing"
            raise ValueError(
                f"{' and '.join(self.searched)} chooses bits of weights, and {why}; remove one of the two"
            )
        return self

    @field_validator("transforms")
    @classmethod
    def _search_sees_the_model_as_it_is(cls, value: tuple[Transform, ...]) -> tuple[Transform, ...]:
        for number, each in enumerate(value):
            if number and getattr(each, "searched", 0):
                raise ValueError(
                    f"{each.name} searches its strength on the model as it is, so it must be the first transform, got "
                    f"it behind {value[number - 1].name}; put it first, or give it a strength"
                )
        return value

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
            if "inputs" in written and written["inputs"] is None:
                written["inputs"] = "none"
        if self.weights is None:
            data["weights"] = "none"
        if not self.model_free:
            del data["model_free"]
        choices = (data["target"] or {}).get("choices") or ()
        unusual: tuple[tuple[Any, Iterable[str]], ...] = (
            *((choice, UNUSUAL) for choice in choices),
            (data["weights"], (*UNUSUAL, "calibration")),
            (data["kv_cache"], KVCache.model_fields),
            (data, ("inputs", "kv_cache", "experts", "target", "budget", "gate")),
            (data["experts"], ("min_tokens",)),
            (data["target"], TargetPart.model_fields),
            (data["budget"], BudgetPart.model_fields),
            (data["gate"], GatePart.model_fields),
        )
        for part, keys in unusual:
            for key in keys if isinstance(part, dict) else ():
                if part[key] is None:
                    del part[key]
        return data

    def published(self) -> dict[str, Any]:
        """`resolved()` for a file that others read: names instead of paths, and nothing of this machine."""
        data = self.resolved()
        data["model"] = _without_folders(self.model)
        data.pop("budget", None)
        for source in data["calibration"]["data"]:
            source["source"] = _without_folders(source["source"])
        return data

    def identity(self) -> dict[str, Any]:
        """What decides the result beside the model, the text and the code, which have digests of their own.

        So the same model or text under another path is the same run.
        """
        data = self.resolved()
        del data["calibration"]["data"]
        data.pop("target", None)
        data.pop("budget", None)
        data.pop("gate", None)
        return data | {"model": None}


def _described(algorithm: AlgorithmConfig) -> str:
    """An algorithm that needs text, with what makes it need some."""
    weighted = algorithm.name == "rtn"
    return "algorithm: rtn with range: weighted" if weighted else f"algorithm: {algorithm.name}"


def refuse_in_memory(recipe: Recipe) -> None:
    """RecipeError for a recipe whose output is no file."""
    if recipe.output.format == registry.MEMORY:
        raise RecipeError(
            "output.format memory is not written to files; call quantkit.quantize_in_memory(recipe), or use "
            f"format: {registry.DEFAULT}"
        )


def _refuse_unstorable(recipe: Recipe, weights: Weights) -> None:
    """ValueError for a scheme, of the recipe or of a rule, that the output's format or the algorithm cannot make."""
    whole = scheme_of({key: getattr(weights, key) for key in WEIGHT_KEYS}, recipe.inputs)
    every = [(whole, weights.algorithm)]
    every += [rule.apply(weights, recipe.inputs) for rule in recipe.rules if not rule.skip]
    for scheme, algorithm in every:
        why = registry.unstorable(recipe.output.format, scheme)
        shared = scheme.weights.granularity in ("tensor", "block")
        if why is None and shared and getattr(algorithm, "groups", None) == "dynamic":
            why = f"groups: dynamic takes a scale for each row, {scheme} shares them between rows; use groups: static"
        if why:
            raise ValueError(why)


def _refuse_mixed_streams(recipe: Recipe, weights: Weights) -> None:
    """ValueError if GPTQ is to see the original model in some layers and the quantized one in others."""
    every = [weights.algorithm, *(rule.algorithm for rule in recipe.rules if rule.algorithm is not None)]
    streams = {each.stream for each in every if each.name == "gptq"}
    if len(streams) > 1:
        raise ValueError(
            "stream is quantized in one place and original in another; give every gptq the same one"
        )


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
        if recipe is not None and (key := recipe.says_no_text) is not None:
            for path, what in recipe.text_for().items():
                found.problem(path, f"{what} needs calibration text, and {key} has none; {_INSTEAD}")
    if found.problems or recipe is None:
        raise RecipeError("\n".join(dict.fromkeys(found.problems)))
    return recipe
