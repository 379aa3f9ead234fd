"""What `quantkit.json` and `quantkit.run.json` hold, as values: docs/checkpoint.md says what each field means.

`plain` is the only place that turns a record into JSON, `parse` the only one that turns JSON into a record. It ignores
keys that it does not know: a newer quantkit may have added them (CHANGELOG.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from quantkit_eval.report import Report

from quantkit.preflight.cache import engine_flag
from quantkit.scheme import NUMBERS, Grid, KVScheme

Record = TypeVar("Record")
REFUSED = "refused by "  # so the notes of a manifest begin that say what an engine does not run


@dataclass(frozen=True)
class FileRecord:
    """A file of the checkpoint. tensors: of a shard, the CRC-32 (hex) of each tensor."""

    sha256: str
    bytes: int
    tensors: dict[str, str] | None = None


@dataclass(frozen=True)
class TensorRecord:
    """What became of a source tensor.

    how: quantized, copied, rescaled, decoded, carried or dropped; the last has a `reason`. "decoded": of a quantized
    source, written as its decoded weight. "carried": copied, and no part of the model that transformers builds.
    "added": no source tensor but a new one, a scale of the KV cache.
    """

    how: str
    became: list[str] | None = None
    reason: str | None = None

    def beside(self, other: TensorRecord | None) -> TensorRecord:
        """What became of a tensor that is several weights (a stack of experts), of which `other` tells the rest."""
        if other is None or other == self:
            return self
        how = "quantized" if "quantized" in (self.how, other.how) else self.how
        return TensorRecord(how, sorted({*(self.became or ()), *(other.became or ())}))


@dataclass(frozen=True)
class LayerRecord:
    """A quantized linear and its errors. details: what its algorithm reports beyond them, numbers or words."""

    name: str
    scheme: str | None = None
    algorithm: str | None = None
    weight_error: float | None = None
    relative_error: float | None = None
    worst_row_error: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    fallbacks: list[str] | None = None

    def to_json(self) -> dict[str, Any]:
        """The file has the details beside the other keys."""
        given = _given(self)
        details: dict[str, Any] = given.pop("details")
        return given | details

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LayerRecord:
        """A layer as `to_json` wrote it."""
        return parse(cls, _nested(value))


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of all tensors, and bits per weight counted from the stored bytes."""

    original_linear_bits_per_weight: float | None = None
    original_bytes: int
    quantized_bytes: int
    linear_bits_per_weight: float
    model_bits_per_weight: float


@dataclass(frozen=True)
class Origin:
    """The model that was quantized."""

    name: str
    type: str


@dataclass(frozen=True)
class Code:
    """Which quantkit made the checkpoint: its version, and the sha256 of its sources."""

    quantkit: str
    source: str


@dataclass(frozen=True)
class Calibration:
    """What was calibrated on. sources: per text its `name`, the `samples` taken from it and the `sha256`."""

    notes: list[str]
    sources: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class GridRecord:
    """A `scheme.Grid` of a KV cache."""

    number: str
    granularity: Literal["tensor", "head", "token", "channel"]
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool

    @property
    def grid(self) -> Grid:
        return Grid(NUMBERS[self.number], self.granularity, self.group_size, self.symmetric, self.dynamic)

    @classmethod
    def of(cls, grid: Grid) -> GridRecord:
        """The record of a grid."""
        keys = ("granularity", "group_size", "symmetric", "dynamic")
        return cls(number=grid.number.name, **{key: getattr(grid, key) for key in keys})


@dataclass(frozen=True, kw_only=True)
class KVRecord:
    """How the KV cache is quantized: a `scheme.KVScheme`. engine: what vLLM is started with for the same, or None."""

    keys: GridRecord
    values: GridRecord
    residual: int = 0
    sinks: int = 0
    rotate: bool = False
    engine: str | None = None

    def __post_init__(self) -> None:
        """ValueError for a scheme that there is none of; a newer quantkit may know it."""
        for grid in (self.keys, self.values):
            if grid.number not in NUMBERS:
                raise ValueError(f"unknown number {grid.number!r}")
        _ = self.scheme

    @property
    def scheme(self) -> KVScheme:
        return KVScheme(self.keys.grid, self.values.grid, self.residual, self.sinks, self.rotate)

    @classmethod
    def of(cls, scheme: KVScheme) -> KVRecord:
        """The record of a scheme."""
        return cls(
            keys=GridRecord.of(scheme.keys),
            values=GridRecord.of(scheme.values),
            residual=scheme.residual,
            sinks=scheme.sinks,
            rotate=scheme.rotate,
            engine=engine_flag(scheme),
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One strength that a search has tried; None is the model as it is.

    loss: mean KL of the quantized model's logits to the original's, nats per token; loss_se: its standard error over
    windows. over_chosen: how much larger the loss is than that of the strength that was chosen, window by window, and
    its standard error.
    """

    strength: float | None = None
    loss: float
    loss_se: float
    over_chosen: float
    over_chosen_se: float


@dataclass(frozen=True, kw_only=True)
class SearchRecord:
    """The search of a setting for the whole model. windows: how many of the calibration windows, the first ones, it was
    measured on. walks: how often the checkpoint was read. trials: by strength.
    """

    transform: str
    strength: float | None = None
    windows: int
    tokens: int
    walks: int
    trials: list[Trial]

    def __str__(self) -> str:
        """What was found, in words."""
        chosen = next(each for each in self.trials if each.strength == self.strength)
        found = "no smoothing" if self.strength is None else f"strength {self.strength:g}"
        said = f"{self.transform}: {found}, KL {1e3 * chosen.loss:.3f} ± {1e3 * chosen.loss_se:.3f} x 1e-3"
        for plain in self.trials:
            if plain.strength is None and self.strength is not None:
                said += f" ({1e3 * plain.loss:.3f} without, larger by {1e3 * plain.over_chosen:.3f} "
                said += f"± {1e3 * plain.over_chosen_se:.3f})"
        return f"{said}; {len(self.trials)} tried on {self.windows} windows"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record of a finished checkpoint (`quantkit.json`). model_free: True if it was made without a model class.

    experts: of a mixture, per layer how many calibration tokens came to each expert.
    """

    schema: str
    identity: dict[str, Any]
    size: Size
    layers: list[LayerRecord]
    scaling: list[dict[str, Any]]
    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord]
    notes: list[str]
    recipe: dict[str, Any] | None = None
    model: Origin | None = None
    code: Code | None = None
    calibration: Calibration | None = None
    left_out: dict[str, str] | None = None
    searches: list[SearchRecord] | None = None
    evaluation: Report | None = None
    kv_cache: KVRecord | None = None
    model_free: bool | None = None
    experts: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; the file says `null` where nothing was calibrated or evaluated."""
        return {"calibration": None, "evaluation": None} | _given(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """A manifest as `to_json` wrote it; ValueError naming what is missing or of another type."""
        layers, evaluation = value.get("layers"), value.get("evaluation")
        if isinstance(layers, list):
            layers = [_nested(layer) if isinstance(layer, dict) else layer for layer in layers]
        if isinstance(evaluation, dict):
            evaluation = {key: each for key, each in evaluation.items() if key != "schema"}
        return parse(cls, {**value, "layers": layers, "evaluation": evaluation})


@dataclass(frozen=True)
class Inputs:
    """Where a run read its inputs. model: the source's folder. data: the calibration texts in the recipe's order."""

    model: str
    data: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """What a block took, from the end of the one before. rss_bytes: memory in use behind it, None if unknown.

    peak_rss_bytes: the most that was in use until then.
    """

    name: str
    seconds: float
    cpu_seconds: float
    rss_bytes: int | None = None
    peak_rss_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run only happened to have (`quantkit.run.json`). files: the sha256 of each file of the checkpoint.

    peak_bytes: the largest resident memory until the checkpoint was finished ("quantize"), and until it was evaluated
    ("evaluate"). predicted_bytes: what was expected of the same, and of "disk"; predicted_seconds: of each phase.
    budget: the recipe's, in bytes. blocks: those that this run has made, in order. inputs:
    where its inputs lay on that machine.
    """

    schema: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int | None = None
    resumed_blocks: int = 0
    threads: int | None = None
    host: dict[str, str] | None = None
    versions: dict[str, str] | None = None
    date: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    predicted_bytes: dict[str, int] = field(default_factory=dict)
    predicted_seconds: dict[str, float] = field(default_factory=dict)
    budget: dict[str, int] | None = None
    blocks: list[BlockFacts] | None = None
    inputs: Inputs | None = None


def plain(value: Any) -> Any:
    """A record as JSON data; a field that is None is left out, unless its class writes itself (`to_json`)."""
    if is_dataclass(value) and not isinstance(value, type):
        return value.to_json() if hasattr(value, "to_json") else _given(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def parse(kind: type[Record], value: Mapping[str, Any]) -> Record:
    """A record of JSON data, without keys it does not know; ValueError naming what is missing or of another type."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        where = (
            ".".join(map(str, each["loc"])) for each in error.errors(include_url=False, include_input=False)
        )
        raise ValueError(", ".join(list(dict.fromkeys(where))[:4])) from None


def _given(record: Any) -> dict[str, Any]:
    values = ((each.name, getattr(record, each.name)) for each in fields(record))
    return {name: plain(value) for name, value in values if value is not None}


def _nested(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer of the file, with what its algorithm reported in `details`."""
    known = {each.name for each in fields(LayerRecord)} - {"details"}
    split: dict[str, Any] = {key: value for key, value in layer.items() if key in known}
    return split | {"details": {key: value for key, value in layer.items() if key not in known}}
