"""The parts of a recipe that say how numbers are stored: `weights`, `inputs`, `kv_cache` and the rules.

A preset is short for other keys and gone once a recipe is read. Keys that say what is usual (integer weights, 16-bit
inputs, an exact cache) are None and are not written back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from quantkit.algorithms.config import AlgorithmConfig
from quantkit.recipe.errors import configs_by_name
from quantkit.recipe.words import did_you_mean, meant_value
from quantkit.recipe.yaml import is_clean
from quantkit.scheme import KV_PRESETS, NUMBERS, PRESETS, Grid, KVScheme, Scheme
from quantkit.transforms.config import TransformConfig

ALGORITHMS = configs_by_name(AlgorithmConfig)
TRANSFORMS = configs_by_name(TransformConfig)
WEIGHT_KEYS = ("number", "bits", "granularity", "group_size", "symmetric", "scale")
UNUSUAL = ("number", "granularity", "scale")  # None in recipes with integer weights
_FLOATS = tuple(name for name, number in NUMBERS.items() if number.kind != "int")
_SIZES = {"fp8_e4m3": None, "fp8_e5m2": None, "fp4_e2m1": 32, "nf4": 64}  # usual group sizes


def named(value: Any, kind: str) -> Any:
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
    NumberName = str
    CacheName = str
else:
    PresetName = Literal[tuple(PRESETS)]
    NumberName = Literal[tuple(NUMBERS)]
    CacheName = Literal[tuple(KV_PRESETS)]
Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_clean)]
Algorithm = Annotated[AlgorithmConfig, BeforeValidator(lambda value: named(value, "algorithm"))]
Bits = Annotated[int, Field(ge=2, le=8)]
GroupSize = Annotated[int, Field(ge=16)] | None
Granularity = Literal["tensor", "channel", "group", "block"]
ScaleName = Literal["fp8_e4m3", "e8m0"]
InputRange = Literal["minmax", "percentile", "mse"]


def _calibrated(value: Any) -> Any:
    """ValueError for what is no way to calibrate experts."""
    if isinstance(value, str) and (value in ("routed", "all") or re.fullmatch("top:[1-9][0-9]{0,5}", value)):
        return value
    raise ValueError(f"must be routed, all or top:N with N from 1, such as top:4; got {value!r}")


Calibrate = Annotated[str, BeforeValidator(_calibrated)]


class Part(BaseModel):
    """A part of a recipe: frozen, without conversions, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Inputs(Part):
    """How the inputs of every quantized linear are rounded. dynamic: scales of the values themselves, else calibrated.

    range: how a calibrated range is chosen.
    """

    number: Literal["int8", "fp8_e4m3"] = "int8"
    granularity: Literal["token", "group", "tensor"] = "token"
    group_size: GroupSize = None
    symmetric: bool = True
    dynamic: bool = True
    range: InputRange = "minmax"

    @model_validator(mode="before")
    @classmethod
    def _tensor_means_calibrated(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("granularity") == "tensor" and "dynamic" not in value:
            return {**value, "dynamic": False}
        return value

    @model_validator(mode="after")
    def _runs(self) -> Self:
        if self.dynamic != (self.granularity != "tensor"):
            raise ValueError(
                f"granularity: {self.granularity} goes with dynamic: {str(self.granularity != 'tensor').lower()} (one "
                "scale of all tokens is calibrated, those of tokens are not)"
            )
        if self.dynamic and self.range != "minmax":
            raise ValueError(f"range: {self.range} is for calibrated scales, granularity: tensor; remove it")
        if not self.symmetric and self.granularity == "group":
            raise ValueError("symmetric: false is not run with groups of inputs; use granularity: token")
        _ = self.grid
        return self

    @property
    def grid(self) -> Grid:
        return Grid(NUMBERS[self.number], self.granularity, self.group_size, self.symmetric, self.dynamic)

    @classmethod
    def written(cls, grid: Grid) -> dict[str, Any]:
        """The keys that say a grid."""
        keys = ("granularity", "group_size", "symmetric", "dynamic")
        return {"number": grid.number.name} | {key: getattr(grid, key) for key in keys}


def none_is_none(value: Any) -> Any:
    """`none` is None: YAML's null would be as if the key was not written."""
    return None if value == "none" else value


MaybeInputs = Annotated[Inputs | None, BeforeValidator(none_is_none)]


class SchemePart(Part):
    """What `weights` and a rule have in common; `preset` and `group_size: channel` are short for other values."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        name = value.get("preset")
        if isinstance(name, str) and name in PRESETS:
            del value["preset"]
            value = _keys(PRESETS[name].weights) | _without(value, name)
        number = value.get("number")
        if isinstance(number, str) and number in NUMBERS:
            bits = NUMBERS[number].bits
            if value.setdefault("bits", bits) != bits:
                raise ValueError(
                    f"number: {number} has {bits} bits, got bits: {value['bits']}; remove one of the two"
                )
            if number in _FLOATS:
                value.setdefault("group_size", _SIZES[number])
            else:
                value["number"] = None
        if value.get("group_size") in ("channel", -1):
            value["group_size"] = None
        return value


def _keys(grid: Grid) -> dict[str, Any]:
    """The keys of `weights` that say a grid; those with the usual value are None."""
    keys = {key: getattr(grid, key) for key in ("bits", "group_size", "symmetric")}
    if grid.number.kind == "int" and grid.granularity in ("channel", "group"):
        return keys | dict.fromkeys(UNUSUAL)
    return keys | {"number": grid.number.name, "granularity": grid.granularity, "scale": grid.scale}


def _without(value: dict[str, Any], preset: str) -> dict[str, Any]:
    """What was written beside a preset; ValueError for bits beside a preset of another kind of number."""
    kind = PRESETS[preset].weights.number
    if kind.kind != "int" and "bits" in value and value["bits"] != kind.bits:
        raise ValueError(
            f"preset: {preset} has {kind.name} weights, got bits: {value['bits']!r}; remove one of the two"
        )
    return value


def scheme_of(keys: Mapping[str, Any], inputs: Inputs | None) -> Scheme:
    """The scheme that the keys of `weights` and `inputs` say; ValueError if there is none such."""
    number = NUMBERS[keys["number"] or f"int{keys['bits']}"]
    size = keys["group_size"]
    granularity: Granularity = keys["granularity"] or ("channel" if size is None else "group")
    if granularity in ("tensor", "channel"):
        size = None
    grid = Grid(number, granularity, size, keys["symmetric"], scale=keys["scale"])
    return Scheme(grid, None if inputs is None else inputs.grid)


class Weights(SchemePart):
    """What happens to every linear of the decoder blocks. A preset fills the keys after it, and `inputs`.

    calibration: `none` refuses a recipe that would need text.
    """

    algorithm: Algorithm
    preset: PresetName | None = Field(None, exclude=True)
    number: NumberName | None = None
    bits: Bits = 4
    granularity: Granularity | None = None
    group_size: GroupSize = 128
    symmetric: bool = True
    scale: ScaleName | None = None
    calibration: Literal["none"] | None = None

    @model_validator(mode="after")
    def _is_a_scheme(self) -> Self:
        _ = self.scheme
        return self

    @property
    def scheme(self) -> Scheme:
        """Of the weights alone."""
        return scheme_of({key: getattr(self, key) for key in WEIGHT_KEYS}, None)


class Rule(SchemePart):
    """An exception for the modules whose name fits the glob `match`: skip them, or replace these keys of `weights`.

    Only keys that were written count; of several fitting rules the last alone is used.
    """

    match: Annotated[Text, Field(max_length=200)]
    skip: bool = False
    algorithm: Algorithm | None = None
    preset: PresetName | None = Field(None, exclude=True)
    number: NumberName | None = None
    bits: Bits | None = None
    granularity: Granularity | None = None
    group_size: GroupSize = None
    symmetric: bool | None = None
    scale: ScaleName | None = None
    inputs: MaybeInputs = None

    @model_validator(mode="before")
    @classmethod
    def _preset_says_inputs(cls, value: Any) -> Any:
        """A preset names the whole scheme, the inputs included; bits alone mean integers."""
        if not isinstance(value, Mapping):
            return value
        name = value.get("preset")
        if isinstance(name, str) and name in PRESETS and "inputs" not in value:
            grid = PRESETS[name].inputs
            return {**value, "inputs": "none" if grid is None else Inputs.written(grid)}
        if "bits" in value and not {"number", "preset"} & value.keys():
            return dict.fromkeys(UNUSUAL) | dict(value)
        return value

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

    def apply(self, weights: Weights, inputs: Inputs | None) -> tuple[Scheme, AlgorithmConfig]:
        """The scheme and algorithm of a module under this rule; ValueError if the keys are no scheme together."""
        keys = {key: getattr(self if key in self.model_fields_set else weights, key) for key in WEIGHT_KEYS}
        return scheme_of(keys, self.inputs_instead_of(inputs)), self.algorithm or weights.algorithm

    def inputs_instead_of(self, inputs: Inputs | None) -> Inputs | None:
        """The inputs of a module under this rule; inputs: those of the recipe."""
        return self.inputs if "inputs" in self.model_fields_set else inputs


class KVCache(Part):
    """How keys and values of the cache are stored: a preset, or number and granularity of both.

    granularity: token (one scale per token and head, of the entries themselves), head or tensor (calibrated). sinks:
    first tokens that stay exact; residual: last ones. rotate: keys are rotated before they are rounded. followed:
    whether later layers are calibrated behind the rounded cache; if not, weights are those of the recipe without it.
    """

    preset: CacheName | None = None
    number: Literal["int8", "int4", "fp8_e4m3"] | None = None
    granularity: Literal["token", "head", "tensor"] | None = None
    sinks: Annotated[int, Field(ge=0, le=1024)] | None = None
    residual: Annotated[int, Field(ge=0, le=65536)] | None = None
    rotate: bool | None = None
    followed: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"preset": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_a_scheme(self) -> Self:
        if (self.preset is None) == (self.number is None):
            raise ValueError(
                f"give a preset ({', '.join(KV_PRESETS)}) or a number, got {'both' if self.preset else 'neither'}"
            )
        if self.preset is not None and self.granularity is not None:
            raise ValueError("a preset says the granularity; remove one of the two")
        calibrated = self.number == "fp8_e4m3"
        if self.granularity is not None and (self.granularity != "token") != calibrated:
            raise ValueError(
                "int8 and int4 have granularity: token, fp8_e4m3 has head or tensor; no engine reads others"
            )
        scheme = self.scheme
        given = {"sinks": scheme.sinks, "residual": scheme.residual, "rotate": scheme.rotate}
        if not scheme.dynamic and any(given.values()):
            named = ", ".join(key for key, value in given.items() if value)
            raise ValueError(
                f"calibrated scales go without {named}: no file format says so; remove it, or use int8 or int4"
            )
        return self

    @property
    def scheme(self) -> KVScheme:
        """The scheme that the keys say."""
        if self.preset is not None:
            found = KV_PRESETS[self.preset]
        else:
            number = NUMBERS[str(self.number)]
            dynamic = number.kind == "int"
            grid = Grid(number, self.granularity or ("token" if dynamic else "head"), dynamic=dynamic)
            found = KVScheme(grid, grid)
        return KVScheme(
            found.keys,
            found.values,
            found.residual if self.residual is None else self.residual,
            found.sinks if self.sinks is None else self.sinks,
            found.rotate if self.rotate is None else self.rotate,
        )


class ExpertsPart(Part):
    """How the experts of a mixture are calibrated.

    calibrate: "routed", on the tokens that the router sends to them, "all", on every token of the layer, or "top:N", on
    those whose router ranks them among its first N, whether it sends them or not. min_tokens: below so many an expert's
    own tokens are filled up with others of its layer; None: as many as a linear has inputs.
    """

    calibrate: Calibrate = "routed"
    min_tokens: Annotated[int, Field(ge=0, le=10_000_000)] | None = None

    @property
    def top(self) -> int | None:
        """N of "top:N"."""
        number = self.calibrate.removeprefix("top:")
        return None if number == self.calibrate else int(number)

    def of(self, experts: int) -> Self:
        """The same for a layer of so many experts: those that rank all of them serve every expert."""
        if self.top is None or self.top < experts:
            return self
        return self.model_copy(update={"calibrate": "all"})
