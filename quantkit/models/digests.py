"""sha256 of files, several at a time: reading and hashing leave the interpreter to other threads."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_AT_ONCE = 4
_PIECE = 4 << 20


def digests(paths: Sequence[Path], told: Callable[[float], None] = lambda share: None) -> list[str]:
    """sha256 (hex) of every file; OSError for one that cannot be read.

    told: called with the share that is read, 0 to 1, about once per second of reading, by one thread at a time.
    """
    size = sum(path.stat().st_size for path in paths)
    progress, stopped = _Progress(size, told), threading.Event()
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1), "quantkit-hash") as threads:
        try:
            return list(threads.map(lambda path: _digest(path, progress, stopped), paths))
        finally:
            stopped.set()  # after an error or an interrupt the others need not be read to their end


def _digest(path: Path, progress: _Progress, stopped: threading.Event) -> str:
    content = hashlib.sha256()
    for piece in _pieces(path):
        content.update(piece)
        progress.add(len(piece))
        if stopped.is_set():
            break
    return content.hexdigest()


def _pieces(path: Path) -> Iterator[memoryview]:
    piece = memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(piece):
            yield piece[:got]


class _Progress:
    """How much of `size` bytes is read, by all threads."""

    def __init__(self, size: int, told: Callable[[float], None]) -> None:
        self._size, self._told = size, told
        self._done, self._said, self._lock = 0, time.monotonic(), threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if time.monotonic() - self._said > 1:
                self._told(min(1.0, self._done / self._size))
                self._said = time.monotonic()
