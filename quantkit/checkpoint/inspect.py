"""What a checkpoint holds, layer by layer, and who can load it; only headers and scales are read.

The report, schema `quantkit-inspect/1`:
    path, model_type, format ("pack-quantized", the method of another tool, or None)
    made_by: the tool that writes this method, None for compressed-tensors and for what is not quantized
    kv_cache: {scheme, engine (what vLLM is started with for the same, or None)}, or None for an exact cache
    layers: [{name, scheme, bits, group_size, symmetric, dtype, shape [N, K], bytes, bits_per_weight,
              scale_range [min, max] or None, error}]; scheme .. symmetric are None for a layer that is not
              quantized, error is the relative squared weight error that quantkit.json holds, or None
    checks: {sizes, digests, tensors, changed}, see `quantkit.checkpoint.check.Checked`
    totals: {bytes, quantized_bytes, weights, quantized_weights, quantized_layers,
             linear_bits_per_weight or None, model_bits_per_weight}
    loaders: [{name, loads, how}]
    engines: [{runs, said}], what each engine would refuse, by `quantkit.preflight`
    target: {asked, findings: [{rule, layers, numbers, remedy, source}], outlook} of the engine that was named, or None
    searches: [{transform, strength, windows, tokens, walks, trials}], see `quantkit.checkpoint.records.SearchRecord`
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from quantkit.checkpoint.check import REMOVE, SchemeOf, check_files, check_values, packing_of
from quantkit.checkpoint.kv import stored_scheme
from quantkit.checkpoint.loaders import Loader, loaders, of_mixture
from quantkit.checkpoint.manifest import MANIFEST, read_manifest
from quantkit.checkpoint.records import plain
from quantkit.errors import ModelError
from quantkit.formats.foreign import METHODS
from quantkit.formats.registry import Codec
from quantkit.models import families
from quantkit.models.config import quantization_config, read_config
from quantkit.models.headers import quantized_linears
from quantkit.models.tensors import TensorInfo, read_tensors
from quantkit.preflight.cache import engine_flag
from quantkit.preflight.check import outlook, preflight, verdicts
from quantkit.preflight.foreign import format_of
from quantkit.preflight.subject import Linear, Subject
from quantkit.preflight.target import NAMES, Target
from quantkit.scheme import KVScheme, Scheme

SCHEMA = "quantkit-inspect/1"


def inspect_checkpoint(
    path: str | Path, verify: bool = False, target: Target | None = None
) -> dict[str, Any]:
    """The report on the folder `path`; ModelError if it is damaged or packed in a way we do not read.

    verify: compare the sha256 of every file with quantkit.json too. target: what must be able to run it.
    """
    path = Path(path)
    config = read_config(path)
    model_type = str(config.get("model_type", ""))
    checked = check_files(path, verify)
    _, tensors = read_tensors(path)
    quantization = quantization_config(path, config)
    codec, scheme_of = packing_of(path, quantization)
    manifest = read_manifest(path, ModelError, REMOVE) if (path / MANIFEST).is_file() else None
    # layer -> relative squared weight error, if quantkit wrote this checkpoint
    cache = stored_scheme(path, codec, quantization)
    errors = {layer.name: layer.weight_error for layer in manifest.layers} if manifest else {}
    layers: list[dict[str, Any]] = []
    schemes: dict[str, Scheme] = {}
    parts: set[str] = set()
    if codec is not None and scheme_of is not None:
        layers, schemes, parts = _packed_layers(codec, scheme_of, tensors, errors)
    values = check_values(tensors, codec, model_type)
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if name not in parts and leaf == "weight" and len(tensor.shape) == 2:
            layers.append(_plain(module, tensor))
    layers.sort(key=lambda layer: [int(p) if p.isdecimal() else -1 for p in layer["name"].split(".")])
    subject = _subject(config, quantization, layers, schemes, cache, tensors)
    who = of_mixture(loaders(model_type, schemes, cache), subject)
    if format_of(subject) is not None:
        who = [who[0], _loader(subject, Target("transformers")), _loader(subject, Target("vllm"))]
    return {
        "schema": SCHEMA,
        "path": str(path),
        "model_type": config.get("model_type"),
        "checks": asdict(checked) | {"tensors": values},
        "format": (quantization.get("format") or quantization.get("quant_method")) if quantization else None,
        "made_by": METHODS.get(str(quantization.get("quant_method"))) if quantization else None,
        "layers": layers,
        "totals": _totals(layers, tensors, parts),
        "kv_cache": _cache(cache),
        "loaders": [each.report() for each in who],
        "engines": [{"runs": runs, "said": said} for runs, said in verdicts(subject)]
        if schemes or cache
        else [],
        "target": None if target is None else _asked(subject, target),
        "searches": plain(manifest.searches or []) if manifest else [],
    }


def _loader(subject: Subject, target: Target) -> Loader:
    """Whether an engine loads a checkpoint of another tool, and with what or why not."""
    found = preflight(subject, target)
    return Loader(NAMES[target.engine], not found, str(found[0]) if found else outlook(subject, target))


def _asked(subject: Subject, target: Target) -> dict[str, Any]:
    findings = [finding.report() for finding in preflight(subject, target)]
    return {
        "asked": str(target),
        "findings": findings,
        "outlook": None if findings else outlook(subject, target),
    }


def _subject(
    config: dict[str, Any],
    quantization: dict[str, Any] | None,
    layers: list[dict[str, Any]],
    schemes: dict[str, Scheme],
    cache: KVScheme | None,
    tensors: dict[str, TensorInfo],
) -> Subject:
    """The checkpoint as the rules about engines look at it."""
    model_type = str(config.get("model_type", ""))
    linears = [
        Linear(
            layer["name"],
            (layer["shape"][0], layer["shape"][1]),
            schemes.get(layer["name"]),
            str((quantization or {}).get("quant_method", "compressed-tensors")),
            transposed=layer["name"] in schemes and families.is_conv1d(model_type, layer["name"]),
        )
        for layer in layers
    ]
    return Subject(linears, config, quantization or {}, cache, list(tensors))


def _cache(scheme: KVScheme | None) -> dict[str, Any] | None:
    return None if scheme is None else {"scheme": str(scheme), "engine": engine_flag(scheme)}


class _Lazy(Mapping[str, torch.Tensor]):
    """The stored tensors of one linear by leaf, read when they are asked for."""

    def __init__(self, infos: dict[str, TensorInfo]) -> None:
        self.infos = infos

    def __getitem__(self, leaf: str) -> torch.Tensor:
        return _read(self.infos[leaf])

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def _packed_layers(
    codec: Codec, scheme_of: SchemeOf, tensors: dict[str, TensorInfo], errors: dict[str, float | None]
) -> tuple[list[dict[str, Any]], dict[str, Scheme], set[str]]:
    """(a row for every linear that is packed, their schemes, the names of their tensors)."""
    found = quantized_linears(codec.leaves, tensors, codec.joint)
    layers, schemes = [], {}
    for module, infos in found.items():
        if scheme := scheme_of(module):
            schemes[module] = scheme
            layers.append(_packed(codec, module, scheme, infos, errors.get(module)))
        else:
            raise ModelError(
                f"{module} is packed ({', '.join(sorted(infos))}), but config.json gives no scheme for it; "
                "fetch the checkpoint again"
            )
    return layers, schemes, {info.name for module in schemes for info in found[module].values()}


def _packed(
    codec: Codec, module: str, scheme: Scheme, infos: dict[str, TensorInfo], error: float | None
) -> dict[str, Any]:
    parts = _Lazy(infos)
    try:
        n, k = codec.dimensions(parts, scheme)
    except ModelError as reason:
        raise ModelError(f"{module}: {reason}") from None
    scale = codec.scale_values(parts, scheme)
    nbytes = sum(info.nbytes for info in infos.values())
    grid = scheme.weights
    return {
        "name": module,
        "scheme": str(scheme),
        "bits": grid.bits,
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "dtype": infos[codec.scale if codec.scale in infos else "weight"].dtype,
        "shape": [n, k],
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / (n * k),
        "scale_range": [float(scale.min()), float(scale.max())],
        "error": error,
    }


def _plain(module: str, tensor: TensorInfo) -> dict[str, Any]:
    return {
        "name": module,
        "scheme": None,
        "bits": None,
        "group_size": None,
        "symmetric": None,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "bits_per_weight": 8 * tensor.nbytes / math.prod(tensor.shape),
        "scale_range": None,
        "error": None,
    }


def _totals(layers: list[dict[str, Any]], tensors: dict[str, TensorInfo], parts: set[str]) -> dict[str, Any]:
    quantized = [layer for layer in layers if layer["scheme"]]
    linear_weights = sum(math.prod(layer["shape"]) for layer in quantized)
    others = sum(math.prod(t.shape) for n, t in tensors.items() if n not in parts)
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    linear_bytes = sum(layer["bytes"] for layer in quantized)
    return {
        "bytes": total_bytes,
        "quantized_bytes": linear_bytes,
        "weights": linear_weights + others,
        "quantized_weights": linear_weights,
        "quantized_layers": len(quantized),
        "linear_bits_per_weight": 8 * linear_bytes / linear_weights if linear_weights else None,
        "model_bits_per_weight": 8 * total_bytes / (linear_weights + others),
    }


def _read(info: TensorInfo) -> torch.Tensor:
    with safe_open(info.file, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(info.name)
    return tensor
