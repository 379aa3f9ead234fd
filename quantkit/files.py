"""Files that are written whole or not at all, and JSON among them; without torch."""

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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from io import BufferedWriter
from pathlib import Path
from typing import Any, cast

from quantkit.errors import NumericalError, OutputError

Bytes = bytes | memoryview
_BEGUN = 4 << 20  # bytes from which on the disk begins with what was written
_AHEAD = 16 << 20  # bytes that wait to be written


def write_atomically(path: Path, pieces: Iterator[Bytes], mode: int | None = None) -> str:
    """Write the pieces to `path` through a temporary file; returns the sha256. OutputError when the disk refuses.

    mode: the permissions the file may have at most; the umask takes away from them.
    """
    return write_named(path, (("", piece) for piece in pieces), mode)[0]


def write_named(
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
        """Begin with what was added to `file`, once it is _BEGUN bytes or more; nothing where the system cannot."""
        end = file.tell()
        if end - self._begun >= _BEGUN and (begin := _sync_file_range()) is not None:
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
