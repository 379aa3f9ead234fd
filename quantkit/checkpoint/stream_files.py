"""The files in which the hidden states of a run outlive an interruption, beside its journal."""

from __future__ import annotations

import contextlib
from pathlib import Path

FOLDER = ".quantkit"


class StreamFiles:
    """Hidden states at the input of a block, one file each, in the folder of the journal.

    process: of a run in several processes, which one; each keeps its own, on a disk that need not be that of the
    journal.
    """

    def __init__(self, output: Path, process: int | None = None) -> None:
        self.folder = output / FOLDER
        self._end = "" if process is None else f"-rank-{process}"

    def at(self, block: int) -> Path:
        """Where the hidden states at the input of `block` are kept."""
        return self.folder / f"streams-{block:05d}{self._end}.safetensors"

    def drop(self, *keep: int) -> None:
        """Remove all that are kept but those at the input of the blocks `keep`."""
        kept = {self.at(block) for block in keep}
        for file in self.folder.glob(f"streams-?????{self._end}.safetensors*"):
            if file not in kept:
                file.unlink(missing_ok=True)

    def drop_all(self) -> None:
        """Remove those of all processes that are kept here."""
        for file in self.folder.glob("streams-*"):
            file.unlink(missing_ok=True)

    def leave(self) -> None:
        """The run is complete: nothing of this process stays, nor a folder that is empty then."""
        self.drop()
        with contextlib.suppress(OSError):
            self.folder.rmdir()
            self.folder.parent.rmdir()
