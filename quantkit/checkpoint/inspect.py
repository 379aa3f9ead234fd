"""What a checkpoint holds, layer by layer, and who can load it; only headers and scales are read.

The report, schema `quantkit-inspect/1`:
    path, model_type, format ("pack-quantized" or None)
    layers: [{name, scheme, bits, group_size, symmetric, dtype, shape [N, K], bytes, bits_per_weight,
              scale_range [min, max] or None, error}]; scheme .. symmetric are None for a layer that is not
              quantized, error is the relative squared weight error that quantkit.json holds, or None
    totals: {bytes, quantized_bytes, weights, quantized_weights, quantized_layers,
             linear_bits_per_weight or None, model_bits_per_weight}
    loaders: [{name, loads, how}]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from quantkit.checkpoint.check import REMOVE
from quantkit.checkpoint.manifest import MANIFEST, read_manifest
from quantkit.errors import ModelError
from quantkit.formats.registry import Codec, codec_of
from quantkit.models import families
from quantkit.models.config import read_config
from quantkit.models.tensors import TensorInfo, read_tensors
from quantkit.scheme import Scheme

SCHEMA = "quantkit-inspect/1"


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """The report on the folder `path`; ModelError if it is corrupt or packed in a way we do not read."""
    path = Path(path)
    config = read_config(path)
    _, tensors = read_tensors(path)
    quantization = config.get("quantization_config")
    codec = codec_of(quantization) if quantization is not None else None
    errors = _stored_errors(path)
    layers = _packed_layers(codec, quantization, tensors, errors) if codec else []
    parts = {name for layer in layers for name in layer.pop("parts")}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if name not in parts and leaf == "weight" and len(tensor.shape) == 2:
            layers.append(_plain(module, tensor))
    layers.sort(key=lambda layer: [int(p) if p.isdecimal() else -1 for p in layer["name"].split(".")])
    return {
        "schema": SCHEMA,
        "path": str(path),
        "model_type": config.get("model_type"),
        "format": quantization.get("format") if quantization else None,
        "layers": layers,
        "totals": _totals(layers, tensors, parts),
        "loaders": loaders(config.get("model_type", ""), [layer for layer in layers if layer["scheme"]]),
    }


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
    codec: Codec, config: dict[str, Any], tensors: dict[str, TensorInfo], errors: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for every linear that is packed, with the names of its tensors as "parts"."""
    scheme_of = codec.parse(config)
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in codec.leaves:
            found.setdefault(module, {})[leaf] = info
    layers = []
    for module, infos in found.items():
        if scheme := scheme_of(module):
            layers.append(_packed(codec, module, scheme, infos, errors.get(module)))
        elif infos.keys() - {"weight"}:
            raise ModelError(
                f"{module} is packed ({', '.join(sorted(infos))}), but config.json gives no scheme for it; "
                "fetch the checkpoint again"
            )
    return layers


def _packed(
    codec: Codec, module: str, scheme: Scheme, infos: dict[str, TensorInfo], error: float | None
) -> dict[str, Any]:
    parts = _Lazy(infos)
    try:
        n, k = codec.dimensions(parts, scheme)
    except ModelError as reason:
        raise ModelError(f"{module}: {reason}") from None
    scale = parts[codec.scale].float()
    nbytes = sum(info.nbytes for info in infos.values())
    grid = scheme.weights
    return {
        "name": module,
        "scheme": str(scheme),
        "bits": grid.bits,
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "dtype": infos[codec.scale].dtype,
        "shape": [n, k],
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / (n * k),
        "scale_range": [float(scale.min()), float(scale.max())],
        "error": error,
        "parts": [info.name for info in infos.values()],
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


# Seen with compressed-tensors 0.20 (docs/checkpoint.md).
ASYMMETRIC = "transformers 5.17 to 5.22 plainly, 5.23 only with dequantize"
READS_WEIGHT = (
    "linears of this family read their weight themselves: transformers 5.17 no, 5.23 only with dequantize"
)
MIXED = "several schemes: transformers 5.23 needs dequantize=True here, which gives a wrong model"


def loaders(model_type: str, quantized: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Who loads these layers: (name, whether, how or why not). quantized: dicts with name, bits, group, symmetric."""
    ours = {"name": "quantkit", "loads": True, "how": "quantkit.load(path)"}
    if not quantized:
        plain = {"name": "transformers", "loads": True, "how": "AutoModelForCausalLM.from_pretrained(path)"}
        return [ours, plain]
    if any(families.is_conv1d(model_type, layer["name"]) for layer in quantized):
        why = "linears of this family are Conv1D, which only quantkit.load runs packed"
        names = ("transformers + compressed-tensors", "vLLM")
        return [ours, *({"name": name, "loads": False, "how": why} for name in names)]
    symmetric = all(layer["symmetric"] for layer in quantized)
    plain = "AutoModelForCausalLM.from_pretrained(path)"
    dequantized = f"{plain[:-1]}, quantization_config=CompressedTensorsConfig(dequantize=True))"
    reads_weight = families.family(model_type).reads_weight
    packed = symmetric and not reads_weight
    several = len({(layer["bits"], layer["group_size"], layer["symmetric"]) for layer in quantized}) > 1
    odd = sorted({layer["bits"] for layer in quantized} - {4, 8})
    return [
        ours,
        {
            "name": "transformers + compressed-tensors",
            "loads": packed or not several,
            "how": plain
            if packed
            else MIXED
            if several
            else f"{READS_WEIGHT if reads_weight else ASYMMETRIC}: {dequantized}",
        },
        {
            "name": "vLLM",
            "loads": not odd,
            "how": f"its kernels take 4 and 8 bits, not {', '.join(map(str, odd))}"
            if odd
            else "vllm serve path",
        },
    ]


def _stored_errors(path: Path) -> dict[str, float]:
    """Layer -> relative squared weight error, from quantkit.json if quantkit wrote this checkpoint."""
    if not (path / MANIFEST).is_file():
        return {}
    layers = read_manifest(path, ModelError, REMOVE)["layers"]
    return {layer["name"]: layer.get("weight_error") for layer in layers if "name" in layer}


def _read(info: TensorInfo) -> torch.Tensor:
    with safe_open(info.file, framework="pt") as file:
        return file.get_tensor(info.name)
