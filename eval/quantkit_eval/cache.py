"""Tensors on disk for later runs: bounded in bytes, checked by digest, shared by processes.

An entry is one file, named by the digest of what it answers: SHA-256 of the rest, a JSON line (name, dtype, shape),
the tensor's bytes. It is written beside and renamed, so that no reader meets a part of it. What cannot be read, or
does not fit its digest, is as if it were not there; a disk that is full or read-only only means that nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import torch

_SUFFIX = ".tensor"
_FREE = 1 << 30  # bytes of the disk that stay free
_STALE = 3600  # seconds after which a file that was never renamed is of a process that died


class Cache:
    """Tensors by name in `folder`, which they fill to at most `limit` bytes.

    subject: what identifies the model that they come from, by its content (a digest of its files): the same names
    under another subject are other entries. Entries that were used least recently go first, those that this object
    has used never; if there is no room without them, new tensors are not kept.
    """

    def __init__(self, folder: str | Path, limit: int, subject: str) -> None:
        self.folder, self.limit, self.subject = Path(folder), limit, subject
        self.found = self.missed = 0
        self._began = time.time()

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor kept under a name, or None."""
        path = self._path(name)
        tensor = _read(path, name)
        if tensor is None:
            self.missed += 1
            return None
        self.found += 1
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: among the last to go
        return tensor

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a tensor, if there is room for it."""
        path, data = self._path(name), _bytes(name, tensor)
        beside = path.with_name(f"{path.stem}.{os.getpid()}.part")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._make_room(len(data)):
                return
            beside.write_bytes(data)
            os.replace(beside, path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / (hashlib.sha256(f"{self.subject} {name}".encode()).hexdigest() + _SUFFIX)

    def _make_room(self, needed: int) -> bool:
        """Whether `needed` more bytes fit, after the oldest entries have gone for them."""
        files = []  # (last use, bytes, path)
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process has removed it
                facts = path.stat()
                files.append((facts.st_mtime, facts.st_size, path))
        total = sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            stale = path.suffix == ".part" and used < self._began - _STALE
            if stale or (path.suffix == _SUFFIX and used < self._began and total + needed > self.limit):
                path.unlink(missing_ok=True)
                total -= size
        return total + needed <= self.limit and shutil.disk_usage(self.folder).free - needed >= _FREE


def _bytes(name: str, tensor: torch.Tensor) -> bytes:
    """The file of a tensor."""
    plain = tensor.detach().cpu().contiguous()
    header = {"name": name, "dtype": str(plain.dtype).removeprefix("torch."), "shape": list(plain.shape)}
    body = json.dumps(header).encode() + b"\n" + plain.view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(body).digest() + body


def _read(path: Path, name: str) -> torch.Tensor | None:
    """The tensor in a file, in memory of its own; None if there is no file or it is not what was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    body = memoryview(data)[32:]
    if hashlib.sha256(body).digest() != data[:32]:
        return None
    line, _, _ = data[32:4096].partition(b"\n")
    header = json.loads(line)
    if header["name"] != name:
        return None
    content = torch.empty(len(body) - len(line) - 1, dtype=torch.uint8)
    content.numpy()[:] = memoryview(body[len(line) + 1 :])
    return content.view(getattr(torch, header["dtype"])).reshape(header["shape"])
