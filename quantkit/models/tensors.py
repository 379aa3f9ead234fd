"""The tensors of a checkpoint folder, from its index and its safetensors headers; without torch.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON {name: {dtype, shape,
data_offsets}}, and the data, without holes. Offsets count from the end of the JSON. Nothing is trusted: sizes
are bounded, every range is checked against the file, and readers of weights need not check again.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from quantkit.errors import ModelError
from quantkit.models.json_reader import parse_json, read_json

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # the limit of the safetensors library
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The dtypes of safetensors: name in a header -> (bits, name in torch). All of the package ask this table.
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"), "U16": (16, "uint16"), "U32": (32, "uint32"), "U64": (64, "uint64"),
    "I8": (8, "int8"), "I16": (16, "int16"), "I32": (32, "int32"), "I64": (64, "int64"),
    "F8_E4M3": (8, "float8_e4m3fn"), "F8_E5M2": (8, "float8_e5m2"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "F16": (16, "float16"), "BF16": (16, "bfloat16"), "F32": (32, "float32"), "F64": (64, "float64"),
    "C64": (64, "complex64"),
}  # fmt: skip
_NAMES = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
WEIGHT_DTYPES = ("F32", "F16", "BF16")  # of weights and scales that quantkit calculates with
FLOATS = ("F64", *WEIGHT_DTYPES)  # whose values can be checked for NaN and infinity
_SHOWN = 8
_INTEGERS = {"U8": "B", "I32": "i", "I64": "q"}  # of headers -> of struct
_PEEKED = 1 << 16  # bytes
_MAX_SIZE = 1 << 62  # elements or bytes, more than any file holds
_DAMAGED = "the file is corrupt, fetch it again"


@dataclass(frozen=True, slots=True)
class OfExpert:
    """Which linear of a stack of experts: the number of the expert, and "gate", "up" or "down".

    halved: whether the stack holds gate and up together. of: how many experts the stack has; its first axis may be
    that of all their rows.
    """

    expert: int
    role: str
    halved: bool
    of: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor. dtype: as safetensors spells it ("BF16"). offset: bytes from the start of `file`.

    parts: of a weight that is stored quantized, the tensors it is decoded from; of one in a stack of experts, the
    stack. It has the name, dtype and shape of the decoded weight, and as `nbytes` those of its parts together, or its
    share of them. expert: which linear of the stack it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    parts: tuple[TensorInfo, ...] = ()
    expert: OfExpert | None = None

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors of the files that it is made from: itself if it is one."""
        return tuple(each for part in self.parts for each in part.stored) if self.parts else (self,)

    @property
    def decoded(self) -> bool:
        """Whether it is stored quantized; of a linear of an expert, whether its stack is."""
        return self.parts[0].decoded if self.expert else bool(self.parts)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensor in its dtype, decoded if it is stored quantized."""
        return math.prod(self.shape) * DTYPES[self.dtype][0] // 8


@dataclass(frozen=True, slots=True)
class Peek:
    """A stored tensor of which little more than the shape is asked for, without torch."""

    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def tolist(self) -> list[int]:
        """The values of a small tensor of integers; ModelError for another."""
        info = self.info
        kind = _INTEGERS.get(info.dtype)
        if kind is None or info.nbytes > _PEEKED:
            raise ModelError(f"{info.name} is {info.dtype} {list(info.shape)}; {_DAMAGED}")
        try:
            with info.file.open("rb") as file:
                file.seek(info.offset)
                raw = file.read(info.nbytes)
            return [value for (value,) in struct.iter_unpack(f"<{kind}", raw)]
        except (OSError, struct.error) as error:
            raise ModelError(f"{info.file}: tensor {info.name} cannot be read: {error}") from error


def torch_dtype(stored: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype: "BF16" -> torch.bfloat16."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[stored][1])
    return dtype


def stored_dtype(dtype: torch.dtype) -> str:
    """The safetensors dtype of a torch dtype: torch.bfloat16 -> "BF16"."""
    return _NAMES[str(dtype).removeprefix("torch.")]


def read_tensors(path: Path) -> tuple[list[Path], dict[str, TensorInfo]]:
    """The weight files of a folder, quantized or not, and what their headers name; ModelError if corrupt."""
    tensors: dict[str, TensorInfo] = {}
    index = weight_map(path) if _indexed(path) else {}
    files = [path / name for name in sorted(set(index.values()))] or [path / SINGLE]
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise ModelError(f"tensor {name} is both in {tensors[name].file.name} and in {file.name}")
            tensors[name] = info
    _check_index(path, index, tensors)
    return files, tensors


def named(names: Iterable[str]) -> str:
    """Names for a message, sorted, cut after a few."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _indexed(path: Path) -> bool:
    """Whether the weights are in several files that an index names; ModelError if there are none to read."""
    if (path / SINGLE).is_file():
        return False
    if (path / INDEX).is_file():
        return True
    others = sorted(
        p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
    )
    found = f", only {named(others)}" if others else ""
    advice = f"give a folder with weights as transformers saves them ({SINGLE})"
    if any(name.startswith("pytorch_model") for name in others):
        advice = "convert with AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    elif any(name.endswith(".gguf") for name in others):
        advice = "a GGUF file is quantized already: give the original checkpoint"
    raise ModelError(
        f"{path} has no {SINGLE} and no {INDEX}{found}; only safetensors is read, as pickled files can run code: "
        f"{advice}"
    )


def weight_map(path: Path) -> dict[str, str]:
    """The index of a folder, tensor name -> file; ModelError if it is corrupt or files are missing."""
    entries = read_json(path / INDEX, limit=MAX_HEADER).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ModelError(f"{path / INDEX} has no weight_map; the file is corrupt, fetch it again")
    bad = {str(v) for v in entries.values() if not isinstance(v, str)}
    files = {v for v in entries.values() if isinstance(v, str)}
    bad |= {v for v in files if re.search(r"[/\\:\0]", v) or v in ("", ".", "..")}
    if bad:
        raise ModelError(f"{path / INDEX} points outside its folder: {named(bad)}; refused")
    missing = {v for v in files if not (path / v).is_file()}
    if missing:
        raise ModelError(f"{path / INDEX} names files that are missing: {named(missing)}; fetch them again")
    return entries


def _check_index(path: Path, index: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    absent = [n for n, file in index.items() if n not in tensors or tensors[n].file.name != file]
    if absent:
        raise ModelError(
            f"{path / INDEX} names tensors that are not in their files: {named(absent)}; fetch them again"
        )


def read_header(file: Path) -> dict[str, TensorInfo]:
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
            header = parse_json(stream.read(length), f"the header of {file}", limit=MAX_HEADER)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ModelError(
            f"{file} has a __metadata__ that is no table of texts; the file is corrupt, fetch it again"
        )
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
    if not isinstance(entry, dict):
        raise ModelError(f"{file}: tensor {name} has no description; the file is corrupt, fetch it again")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(f"{file}: tensor {name} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape):
        raise ModelError(
            f"{file}: tensor {name} has the shape {shape!r}; the file is corrupt, fetch it again"
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ModelError(
            f"{file}: tensor {name} has the offsets {offsets!r}; the file is corrupt, fetch it again"
        )
    nbytes = math.prod(shape) * DTYPES[dtype][0] // 8
    if offsets[1] - offsets[0] != nbytes:
        raise ModelError(
            f"{file}: tensor {name} of shape {shape} and dtype {dtype} needs {nbytes} bytes, its "
            f"offsets {offsets} give {offsets[1] - offsets[0]}; the file is corrupt, fetch it again"
        )
    return TensorInfo(name, dtype, tuple(shape), file, start + offsets[0], nbytes)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of numbers that may count elements or bytes."""
    return isinstance(values, list) and all(type(each) is int and 0 <= each < _MAX_SIZE for each in values)
