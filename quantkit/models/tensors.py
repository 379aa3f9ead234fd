"""The tensors of a checkpoint folder, from its index and its safetensors headers; without torch.

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
from pathlib import Path
from typing import Any

from quantkit.errors import ModelError

MAX_HEADER = 100_000_000  # the limit of the safetensors library
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
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


def read_json(path: Path, limit: int) -> Any:
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
    index = read_json(path / INDEX, MAX_HEADER)
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
