"""What a checkpoint folder holds, from `config.json` and the safetensors headers; without torch.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON {name: {dtype, shape,
data_offsets}}, and the data, without holes. Offsets count from the end of the JSON. Nothing is trusted: sizes
are bounded, every range is checked against the file, and readers of weights need not check again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.errors import ModelError
from quantkit.models import families

MAX_HEADER = 100_000_000  # the limit of the safetensors library
MAX_CONFIG = 10_000_000
WEIGHT_DTYPES = ("F32", "F16", "BF16")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
_DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(@[\w./-]+)?")
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor. dtype: as safetensors spells it ("BF16"). offset: bytes from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Headers:
    """A checkpoint that passed every check its headers allow. tensors: by disk name, in file order."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: list[Path]

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @cached_property
    def module_names(self) -> dict[str, str]:
        """Disk name -> name in transformers' causal LM."""
        return families.module_names(self.model_type, self.tensors)

    @cached_property
    def dropped(self) -> dict[str, str]:
        """Disk name -> why transformers leaves this tensor out."""
        reasons = {name: families.dropped(self.model_type, name) for name in self.tensors}
        return {name: reason for name, reason in reasons.items() if reason}

    @property
    def tied(self) -> bool:
        """Whether the output head is the input embedding."""
        said = self.config.get("tie_word_embeddings")
        if said is None and self.model_type in families.FAMILIES | families.OTHERS:
            said = families.family(self.model_type).tied
        if said is None:
            said = f"{families.HEAD}.weight" not in self.module_names.values()
        return bool(said)


def resolve_model(path_or_id: str | Path | None, default: Path) -> Path:
    """The folder of a model: a local one, that of a hub id[@revision] (fetched or cached), or `default`."""
    if path_or_id is None:
        return default
    text = str(path_or_id)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{text} is a file; a model is a folder with config.json and safetensors weights")
    if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(text):
        raise ModelError(f"no folder {text!r}; give a model folder or a hub id like owner/name[@revision]")
    return _download(text)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"model {hub_id!r} is no local folder and cannot be fetched from the hub: {reason}; check the "
            "name and the network, log in for a gated model, or give a local folder"
        ) from error


def read_checkpoint(path: str | Path) -> Headers:
    """Read and check the headers of the checkpoint in folder `path`; ModelError, with names, if one fails."""
    path = Path(path)
    if not path.is_dir():
        raise ModelError(f"no model folder {path}")
    config = _config(path)
    files, tensors = read_tensors(path)
    headers = Headers(path, config, tensors, files)
    _check_tensors(headers)
    return headers


def read_tensors(path: Path) -> tuple[list[Path], dict[str, TensorInfo]]:
    """The weight files of a folder, quantized or not, and what their headers name; ModelError if corrupt."""
    tensors: dict[str, TensorInfo] = {}
    files = _weight_files(path)
    for file in files:
        for name, info in _read_header(file).items():
            if name in tensors:
                raise ModelError(f"tensor {name} is both in {tensors[name].file.name} and in {file.name}")
            tensors[name] = info
    _check_index(path, files, tensors)
    return files, tensors


def named(names: Iterable[str]) -> str:
    """Names for a message, sorted, cut after a few."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _read_json(path: Path, limit: int) -> Any:
    try:
        if path.stat().st_size > limit:
            raise ModelError(
                f"{path} has {path.stat().st_size} bytes, more than the {limit} allowed; is it what it says?"
            )
        return _parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse_json(raw: bytes, what: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{what} is not valid JSON ({error}); the file is corrupt, fetch it again") from None


def _config(path: Path) -> dict[str, Any]:
    """config.json, refused if it describes something other than a dense, unquantized, text-only causal LM."""
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{path} has no config.json; a model is a folder with config.json and safetensors weights"
        )
    config = _read_json(file, MAX_CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} names no model_type; it is not the config of a transformers model")
    kind = config["model_type"]
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        _refuse_kind(part, f"{path} ({part.get('model_type', kind)})")
    if nested is not None:
        _refuse_multimodal(f"{path} ({kind})")
    if kind in families.UNSUPPORTED:
        raise ModelError(f"{path}: model type {kind} is not supported: {families.UNSUPPORTED[kind]}")
    architectures = config.get("architectures") or []
    other_heads = [a for a in architectures if isinstance(a, str) and re.search(r"For(?!CausalLM)[A-Z]", a)]
    if other_heads:
        raise ModelError(
            f"{path} holds {', '.join(other_heads)}, not a causal LM; give a ...ForCausalLM checkpoint"
        )
    return config


def _refuse_kind(config: dict[str, Any], what: str) -> None:
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise ModelError(f"{what} is already quantized ({method}); give the original checkpoint")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{what} is an encoder-decoder model; only decoder-only causal LMs are supported")
    if any(config.get(key) for key in families.OTHER_MODALITIES):
        _refuse_multimodal(what)
    for key in families.EXPERT_COUNTS:
        count = config.get(key)
        if isinstance(count, int) and count > 1:
            raise ModelError(
                f"{what} is a mixture of experts ({key}: {count}), not supported yet; use a dense model"
            )
    if config.get("auto_map") and config.get("model_type") not in families.FAMILIES:
        raise ModelError(
            f"{what} needs remote code (auto_map in config.json), which quantkit never runs; if your "
            "transformers knows this model type, remove auto_map from config.json"
        )


def _refuse_multimodal(what: str) -> None:
    raise ModelError(
        f"{what} is a multimodal model; only text models are supported: save its text part as a causal LM of "
        "its own (Gemma 3: Gemma3ForCausalLM.from_pretrained(...).save_pretrained(...)) and give that folder"
    )


def _weight_files(path: Path) -> list[Path]:
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if (path / INDEX).is_file():
        return [path / name for name in sorted(set(_weight_map(path).values()))]
    others = sorted(
        p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
    )
    found = f", only {named(others)}" if others else ""
    raise ModelError(
        f"{path} has no {SINGLE} and no {INDEX}{found}; only safetensors is read (pickled .bin files can run "
        "code): convert with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    )


def _weight_map(path: Path) -> dict[str, str]:
    index = _read_json(path / INDEX, MAX_HEADER)
    entries = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ModelError(f"{path / INDEX} has no weight_map; the file is corrupt, fetch it again")
    bad = [
        v
        for v in entries.values()
        if not isinstance(v, str) or re.search(r"[/\\:\0]", v) or v in ("", ".", "..")
    ]
    if bad:
        raise ModelError(f"{path / INDEX} points outside its folder: {named(set(map(str, bad)))}; refused")
    missing = {v for v in entries.values() if not (path / v).is_file()}
    if missing:
        raise ModelError(f"{path / INDEX} names files that are missing: {named(missing)}; fetch them again")
    return entries


def _check_index(path: Path, files: list[Path], tensors: dict[str, TensorInfo]) -> None:
    if files == [path / SINGLE]:
        return
    entries = _weight_map(path)
    absent = [n for n, file in entries.items() if n not in tensors or tensors[n].file.name != file]
    if absent:
        raise ModelError(
            f"{path / INDEX} names tensors that are not in their files: {named(absent)}; fetch them again"
        )


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelError(f"{file} is truncated or no safetensors file ({size} bytes); fetch it again")
            if length > MAX_HEADER:
                raise ModelError(
                    f"{file} has a header of {length} bytes, more than the {MAX_HEADER} allowed; refused"
                )
            header = _parse_json(stream.read(length), f"the header of {file}")
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error
    if not isinstance(header, dict):
        raise ModelError(
            f"the header of {file} is not a table of tensors; the file is corrupt, fetch it again"
        )
    header.pop("__metadata__", None)
    start = 8 + length
    infos = [_tensor_info(file, name, entry, start) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    expected = start
    for info in infos:
        if info.offset != expected:
            what = "overlaps the tensor before it" if info.offset < expected else "leaves a hole before it"
            raise ModelError(f"{file}: the data of {info.name} {what}; the file is corrupt, fetch it again")
        expected = info.offset + info.nbytes
    if expected > size:
        short = [info.name for info in infos if info.offset + info.nbytes > size]
        raise ModelError(
            f"{file} is truncated: {expected - size} bytes are missing, in {named(short)}; fetch it again"
        )
    if expected < size:
        raise ModelError(
            f"{file} has {size - expected} bytes after its last tensor; the file is corrupt, fetch it again"
        )
    return {info.name: info for info in infos}


def _tensor_info(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    def size(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**62

    if not isinstance(entry, dict):
        raise ModelError(f"{file}: tensor {name} has no description; the file is corrupt, fetch it again")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in _BITS if isinstance(dtype, str) else True:
        raise ModelError(f"{file}: tensor {name} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(map(size, shape)):
        raise ModelError(
            f"{file}: tensor {name} has the shape {shape!r}; the file is corrupt, fetch it again"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(size, offsets)):
        raise ModelError(
            f"{file}: tensor {name} has the offsets {offsets!r}; the file is corrupt, fetch it again"
        )
    nbytes = math.prod(shape) * _BITS[dtype] // 8
    if offsets[1] - offsets[0] != nbytes:
        raise ModelError(
            f"{file}: tensor {name} of shape {shape} and dtype {dtype} needs {nbytes} bytes, its "
            f"offsets {offsets} give {offsets[1] - offsets[0]}; the file is corrupt, fetch it again"
        )
    return TensorInfo(name, dtype, tuple(shape), file, start + offsets[0], nbytes)


def _check_tensors(headers: Headers) -> None:
    names = [name for name in headers.tensors if name not in headers.dropped]
    if not names:
        raise ModelError(f"{headers.path} holds no weights")
    experts = [name for name in names if families.EXPERT_TENSOR.search(name)]
    if experts:
        raise ModelError(
            f"{headers.path} is a mixture of experts ({named(experts)}), not supported yet; use a dense model"
        )
    quantized = [name for name in names if families.QUANTIZED_TENSOR.search(name)]
    if quantized:
        raise ModelError(
            f"{headers.path} is already quantized ({named(quantized)}); give the original checkpoint"
        )
    wrong = [
        f"{n} ({headers.tensors[n].dtype})" for n in names if headers.tensors[n].dtype not in WEIGHT_DTYPES
    ]
    if wrong:
        raise ModelError(
            f"{headers.path} has weights that are not {', '.join(WEIGHT_DTYPES)}: {named(wrong)}"
        )
