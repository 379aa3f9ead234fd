"""How two checkpoints differ: what was asked for, what is stored, how large and how far off it is, and which bytes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit_eval.report import Report

from quantkit.checkpoint.check import digest_file, packing_of
from quantkit.checkpoint.compare import Difference, differences
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.checkpoint.manifest import MANIFEST, RUN, read_manifest
from quantkit.checkpoint.records import Manifest, plain
from quantkit.errors import ModelError
from quantkit.models.config import quantization_config, read_config
from quantkit.models.tensors import INDEX, read_tensors
from quantkit.plan import starred

SCHEMA = "quantkit-diff/1"
LATER = "fetch it again"
_UNCOMPARED = (MANIFEST, RUN, INDEX)  # their contents are compared, not their bytes
IDENTITY = {
    "model": "source (sha256)",
    "data": "calibration tokens (sha256)",
    "code": "quantkit",
    "device": "device",
    "processes": "processes",
    "statistics": "statistics of the original model",
}


@dataclass(frozen=True)
class Side:
    """One of the two. format: of its packed linears, None if it has none. made: whether quantkit has recorded how."""

    path: str
    format: str | None
    bytes: int
    bits_per_weight: float
    linear_bits_per_weight: float | None
    kv_cache: str | None
    made: bool


@dataclass(frozen=True)
class Key:
    """Something that was asked for otherwise, or an input that was another; None where one has no such thing."""

    key: str
    one: Any
    other: Any


@dataclass(frozen=True)
class Layer:
    """A linear or another matrix in both. Each pair is of the two checkpoints.

    schemes: its scheme, or its dtype if it is not quantized; None where there is none of that name. bytes: stored.
    weight_errors: recorded squared error over squared weight; relative_errors: that of the objective.
    """

    name: str
    schemes: tuple[str | None, str | None]
    bytes: tuple[int, int]
    weight_errors: tuple[float | None, float | None]
    relative_errors: tuple[float | None, float | None]


@dataclass(frozen=True)
class Kind:
    """Layers whose names differ only in numbers, with the same two schemes. errors: medians of `weight_errors`."""

    name: str
    count: int
    schemes: tuple[str | None, str | None]
    bytes: tuple[int, int]
    errors: tuple[float | None, float | None]


@dataclass(frozen=True)
class Diff:
    """How `other` differs from `one`.

    recipe: keys of the recipe and inputs of the run that differ; None unless quantkit made both. layers: all of them.
    tensors: how many both have, or one has. differences: the tensors whose bytes are not the same. files: others that
    are not the same, or are in one folder only. evaluation: of `other` against `one`, if it was asked for.
    """

    one: Side
    other: Side
    recipe: list[Key] | None
    layers: list[Layer]
    tensors: int
    differences: list[Difference]
    files: list[str]
    evaluation: Report | None = None

    @property
    def identical(self) -> bool:
        """Whether they have the same tensors and files and were made alike."""
        return not (self.recipe or self.differences or self.files)

    @property
    def kinds(self) -> list[Kind]:
        """The layers, alike ones together, in the order of their first."""
        groups: dict[tuple[Any, ...], list[Layer]] = {}
        for layer in self.layers:
            groups.setdefault((starred(layer.name), layer.schemes), []).append(layer)
        return [_kind(name, schemes, layers) for (name, schemes), layers in groups.items()]

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema "quantkit-diff/1" (docs/reproducing.md)."""
        values: dict[str, Any] = plain(vars(self) | {"kinds": self.kinds})
        return {"schema": SCHEMA, "identical": self.identical} | values


def diff_checkpoints(one: str | Path, other: str | Path) -> Diff:
    """Compare the checkpoints in two folders, quantized by quantkit, by another tool, or not at all.

    All of both is read, a few MB at a time. ModelError if one is damaged, or packed in a way that is not read.
    """
    paths = Path(one), Path(other)
    reports = [inspect_checkpoint(path) for path in paths]
    manifests = [_manifest(path) for path in paths]
    tensors = [read_tensors(path)[1] for path in paths]
    codecs, schemes = zip(
        *(packing_of(p, quantization_config(p, read_config(p))) for p in paths), strict=True
    )
    alike = (
        type(codecs[0]) is type(codecs[1]) and codecs[0] is not None and vars(codecs[0]) == vars(codecs[1])
    )

    def scheme_of(name: str) -> Any:
        found = [each(name) if each else None for each in schemes]
        return found[0] if found[0] == found[1] else None

    return Diff(
        one=_side(reports[0], manifests[0]),
        other=_side(reports[1], manifests[1]),
        recipe=_recipe(*manifests),
        layers=_layers(reports, manifests),
        tensors=len(tensors[0].keys() | tensors[1].keys()),
        differences=list(differences(tensors[0], tensors[1], codecs[0] if alike else None, scheme_of)),
        files=_files(*paths),
    )


def _manifest(path: Path) -> Manifest | None:
    return read_manifest(path, ModelError, LATER) if (path / MANIFEST).is_file() else None


def _side(report: dict[str, Any], manifest: Manifest | None) -> Side:
    totals, cache = report["totals"], report["kv_cache"]
    return Side(
        path=report["path"],
        format=report["format"],
        bytes=totals["bytes"],
        bits_per_weight=totals["model_bits_per_weight"],
        linear_bits_per_weight=totals["linear_bits_per_weight"],
        kv_cache=None if cache is None else cache["scheme"],
        made=manifest is not None,
    )


def _recipe(one: Manifest | None, other: Manifest | None) -> list[Key] | None:
    """Keys in which recipes and inputs of two runs differ."""
    if one is None or other is None:
        return None
    asked = [dict(leaves(each.recipe or {})) for each in (one, other)]
    for values, each in zip(asked, (one, other), strict=True):
        values |= {said: each.identity[key] for key, said in IDENTITY.items() if key in each.identity}
    keys = [*asked[0], *(key for key in asked[1] if key not in asked[0])]
    # an empty list that is none in the other checkpoint says nothing more
    inside = {
        ".".join(parts[:end]) for key in keys for parts in [key.split(".")] for end in range(1, len(parts))
    }
    apart = (Key(key, asked[0].get(key), asked[1].get(key)) for key in keys if key not in inside)
    return [each for each in apart if each.one != each.other]


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf of a recipe: "weights.bits", "rules.0.match"."""
    parts: Any = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, each in parts:
        path = f"{at}.{key}" if at else str(key)
        if isinstance(each, Mapping | list) and each:
            yield from leaves(each, path)
        else:
            yield path, each


def _layers(reports: list[dict[str, Any]], manifests: list[Manifest | None]) -> list[Layer]:
    found = [{layer["name"]: layer for layer in report["layers"]} for report in reports]
    records = [{layer.name: layer for layer in each.layers} if each else {} for each in manifests]
    layers = []
    for name in [*found[0], *(each for each in found[1] if each not in found[0])]:
        both = [each.get(name) for each in found]
        kept = [each.get(name) for each in records]
        layers.append(
            Layer(
                name,
                schemes=_pair(each and (each["scheme"] or each["dtype"]) for each in both),
                bytes=_pair(each["bytes"] if each else 0 for each in both),
                weight_errors=_pair(each and each.weight_error for each in kept),
                relative_errors=_pair(each and each.relative_error for each in kept),
            )
        )
    return layers


def _pair(values: Iterator[Any]) -> Any:
    one, other = values
    return one, other


def _kind(name: str, schemes: tuple[str | None, str | None], layers: list[Layer]) -> Kind:
    errors = [[e for layer in layers if (e := layer.weight_errors[side]) is not None] for side in (0, 1)]
    return Kind(
        name,
        len(layers),
        schemes,
        bytes=_pair(sum(layer.bytes[side] for layer in layers) for side in (0, 1)),
        errors=_pair(statistics.median(each) if each else None for each in errors),
    )


def _files(one: Path, other: Path) -> list[str]:
    """Files beside the weights that are not the same, in words."""
    listed = []
    for path in (one, other):
        files = (each for each in path.rglob("*") if each.is_file() and each.suffix != ".safetensors")
        names = {str(each.relative_to(path)) for each in files}
        listed.append({n for n in names if n not in _UNCOMPARED and not n.startswith(".")})
    found = []
    for name in sorted(listed[0] | listed[1]):
        if name not in listed[0] or name not in listed[1]:
            found.append(f"{name}: only in the {'first' if name in listed[0] else 'second'}")
        elif digest_file(one / name) != digest_file(other / name):
            found.append(f"{name}: differs")
    return found
