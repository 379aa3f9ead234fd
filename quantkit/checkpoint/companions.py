"""Copy companions, the files beside a model's weights, into the output, with at most the permissions they had."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from quantkit.checkpoint.records import FileRecord
from quantkit.errors import ModelError
from quantkit.files import write_atomically
from quantkit.models.companions import Companion, Companions

_PIECE = 4 << 20  # bytes in memory at a time


def copy_companions(companions: Companions, output: Path) -> dict[str, FileRecord]:
    """Copy them into `output`; returns their records by name."""
    copied: dict[str, FileRecord] = {}
    for name, each in companions.files.items():
        target = output / name
        if target.parent != output:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.parent.resolve() != output.resolve() / Path(name).parent:
                raise ModelError(
                    f"{target.parent} is reached through a symbolic link; choose another --output"
                )
        digest = write_atomically(target, _pieces(each), each.mode)
        copied[name] = FileRecord(digest, target.stat().st_size)
    return copied


def _pieces(companion: Companion) -> Iterator[bytes]:
    try:
        handle = os.open(companion.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ModelError(f"{companion.file} cannot be read: {error.strerror or error}") from error
    with open(handle, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ModelError(f"{companion.file} is no regular file any more; it changed during the run")
        while piece := file.read(_PIECE):
            yield piece
