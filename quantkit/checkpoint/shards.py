"""Writing safetensors files so that a killed run leaves either the whole file or none.

The `safetensors` library wants every tensor in memory at once; a 70B embedding need not be: tensors that are copied
unchanged are streamed from the source file in pieces. Layout: u64 header length, JSON header padded with spaces to 8
bytes, buffers in header order without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.errors import ModelError, NumericalError
from quantkit.files import Bytes, write_named
from quantkit.models.families import may_be_infinite
from quantkit.models.tensors import FLOATS, TensorInfo, stored_dtype, torch_dtype

_PIECE = 4 << 20


@dataclass(frozen=True)
class Streamed:
    """A tensor that is made while it is written. dtype: as safetensors spells it. pieces: its rows in order, once."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Written:
    """A finished file: its size and digest, and the bytes and the CRC-32 (hex) of each tensor."""

    file: str
    nbytes: int
    sha256: str
    tensors: dict[str, int]
    crc32: dict[str, str]


def shard_name(part: int, parts: int) -> str:
    """The file of one part of a checkpoint, counted from 0."""
    return f"model-{part + 1:05d}-of-{parts:05d}.safetensors"


Entry = torch.Tensor | TensorInfo | Streamed


def write_shard(path: Path, tensors: Mapping[str, Entry]) -> Written:
    """Write `tensors` to `path` atomically: temporary file, fsync, rename, fsync of the folder.

    A `TensorInfo` is copied byte by byte from its source file and checked for NaN and infinity on the way. Tensors are
    written, and those that are `Streamed` made, in the order of their names.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, sizes = 0, {}
    for name in sorted(tensors):
        t = tensors[name]
        dtype, shape = stored_dtype(t.dtype) if isinstance(t, torch.Tensor) else t.dtype, list(t.shape)
        sizes[name] = t.nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[tuple[str, Bytes]]:
        yield "", len(text).to_bytes(8, "little") + text
        for name in sorted(tensors):
            for piece in _bytes(path, name, tensors[name]):
                yield name, piece

    digest, crcs = write_named(path, pieces())
    sums = {name: f"{crcs.get(name, 0):08x}" for name in sizes}
    return Written(path.name, 8 + len(text) + offset, digest, sizes, sums)


def _bytes(path: Path, name: str, entry: Entry) -> Iterator[Bytes]:
    if isinstance(entry, TensorInfo):
        yield from _copied(entry)
    elif isinstance(entry, torch.Tensor):
        yield from _own(path, name, entry)
    else:
        left = entry.nbytes
        for piece in entry.pieces():
            left -= piece.nbytes
            yield from _own(path, name, piece)
        assert not left, f"{name}: {left} bytes more than were made"


def _own(path: Path, name: str, tensor: torch.Tensor) -> Iterator[memoryview]:
    if tensor.is_floating_point() and not _is_finite(tensor):
        raise NumericalError(
            f"{path.name}: {name} became NaN or infinite; look for extreme weights before it"
        )
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel():
        yield flat.view(torch.uint8).numpy().data


def _is_finite(tensor: torch.Tensor) -> bool:
    if (
        tensor.dtype == torch.float8_e4m3fn
    ):  # torch.isfinite knows no FP8; its only NaN is all ones but for the sign
        return not tensor.numel() or int((tensor.view(torch.uint8) & 127).max()) < 127
    values = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(values).all())


def _copied(info: TensorInfo) -> Iterator[memoryview]:
    with open(info.file, "rb", buffering=0) as source:
        source.seek(info.offset)
        left = info.nbytes
        while left:
            piece = memoryview(bytearray(min(_PIECE, left)))
            piece = piece[: source.readinto(piece)]
            if not piece:
                raise ModelError(
                    f"{info.file} ended inside tensor {info.name}: the file changed during the run"
                )
            if info.dtype in FLOATS and not may_be_infinite(info.name):
                check_finite(info.name, torch.frombuffer(piece, dtype=torch_dtype(info.dtype)))
            left -= len(piece)
            yield piece


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """ModelError naming the tensor if it holds NaN or infinity."""
    if tensor.numel() and not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
        raise ModelError(f"tensor {name} holds NaN or infinity; the checkpoint is damaged, get a sound copy")
