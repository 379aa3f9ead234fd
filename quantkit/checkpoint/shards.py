"""Writing safetensors files so that a killed run leaves either the whole file or none.

The `safetensors` library wants every tensor in memory at once; a 70B embedding need not be: tensors that are copied
unchanged are streamed from the source file in pieces. Layout: u64 header length, JSON header padded with spaces to 8
bytes, buffers in header order without gaps.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BufferedWriter
from pathlib import Path
from typing import Any, cast

import torch

from quantkit.errors import ModelError, NumericalError, OutputError
from quantkit.models.families import may_be_infinite
from quantkit.models.tensors import FLOATS, TensorInfo, stored_dtype, torch_dtype

_PIECE = 4 << 20
_AHEAD = 16 << 20  # bytes that wait to be written


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
Bytes = bytes | memoryview


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

    digest, crcs = _write(path, pieces())
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


def write_atomically(path: Path, pieces: Iterator[Bytes], mode: int | None = None) -> str:
    """Write the pieces to `path` through a temporary file; returns the sha256. OutputError when the disk refuses.

    mode: the permissions the file may have at most; the umask takes away from them.
    """
    return _write(path, (("", piece) for piece in pieces), mode)[0]


def _write(
    path: Path, pieces: Iterator[tuple[str, Bytes]], mode: int | None = None
) -> tuple[str, dict[str, int]]:
    """`write_atomically` of pieces with names: (the sha256 of all, the CRC-32 of the pieces of each name).

    Another thread hashes and writes, and the disk begins at once, while the next piece is made here. No more than
    _AHEAD bytes wait.
    """
    temporary = path.with_name(path.name + ".tmp")
    digest, crcs = hashlib.sha256(), dict[str, int]()
    try:
        with (
            open(temporary, "wb", opener=None if mode is None else _opener(mode)) as file,
            ThreadPoolExecutor(1, "quantkit-write") as thread,
        ):

            def take(name: str, piece: Bytes) -> int:
                digest.update(piece)
                crcs[name] = zlib.crc32(piece, crcs.get(name, 0))
                file.write(piece)
                begin_writing(file)
                return len(piece)

            begin_writing = _Writeback()
            waiting, held = deque[Future[int]](), 0
            for name, piece in pieces:
                waiting.append(thread.submit(take, name, piece))
                held += len(piece)
                while held > _AHEAD:
                    held -= waiting.popleft().result()
            for each in waiting:
                each.result()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        _unlink(temporary)
        raise output_error(path, error) from error
    except BaseException:
        _unlink(temporary)
        raise
    return digest.hexdigest(), crcs


class _Writeback:
    """Has the disk write a growing file as it grows, and does not wait for it: the fsync in the end has less to do."""

    _NOW = 2  # SYNC_FILE_RANGE_WRITE of Linux

    def __init__(self) -> None:
        self._begun = 0

    def __call__(self, file: BufferedWriter) -> None:
        """Begin with what was added to `file`, once it is _PIECE bytes or more; nothing where the system cannot."""
        end = file.tell()
        if end - self._begun >= _PIECE and (begin := _sync_file_range()) is not None:
            begin(file.fileno(), self._begun, end - self._begun, self._NOW)
            self._begun = end


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's function of this name; None elsewhere."""
    try:
        function: Any = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return cast("Callable[[int, int, int, int], int]", function)


def _opener(mode: int) -> Callable[[str, int], int]:
    def opened(path: str, flags: int) -> int:
        _unlink(Path(path))  # one left by a kill would keep its permissions
        return os.open(path, flags | os.O_EXCL, mode)

    return opened


def _unlink(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink()


def write_json(path: Path, value: object) -> str:
    """A JSON file with sorted keys, atomically; returns the sha256."""
    check_numbers(value, path.name)
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return write_atomically(path, iter([text.encode()]))


def check_numbers(value: object, where: str) -> None:
    """NumericalError naming the first NaN or infinity in a value that is to be written as JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        raise NumericalError(
            f"{where} became {value}; look for extreme weights in the model, or leave the layer out with a rule"
        )
    if isinstance(value, dict):
        for key, each in value.items():
            check_numbers(each, f"{where}: {key}")
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            name = each.get("name", number) if isinstance(each, dict) else number
            check_numbers(each, f"{where}: {name}")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def output_error(path: Path, error: OSError) -> OutputError:
    """What went wrong with the output folder, in words, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "the disk is full; free space and run the same command again, it continues where it stopped"
    else:
        remedy = f"{error.strerror or error}; choose another --output or make the folder writable"
    return OutputError(f"cannot write {path}: {remedy}")
