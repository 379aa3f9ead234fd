"""The journal of a run: what is finished, so that the same command continues after a kill.

`OUT/.quantkit/journal.jsonl`: a first line with what the run is made of (recipe, model, data, code), then one line
per finished shard. A line is appended, flushed and synced only after the shard's rename; a torn last line is ignored.
Beside it lie the hidden states at the input of the next block, when the run needs them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

from quantkit.checkpoint.shards import output_error, sync_folder
from quantkit.errors import OutputError

FOLDER = ".quantkit"


class Journal:
    """Open the journal of `output` for a run made of `identity` (a flat JSON-able dict).

    resume: continue finished work of the same run; otherwise start over. OutputError if the folder belongs to a run
    with another identity (naming what differs), is in use by another process, or holds foreign files.
    """

    def __init__(self, output: Path, identity: dict, resume: bool = True) -> None:
        self.output = output
        self.folder = output / FOLDER
        self.file = self.folder / "journal.jsonl"
        try:
            ours = self.folder.exists() or (output / "quantkit.json").exists()
            if output.exists() and not ours and any(output.iterdir()):
                raise OutputError(
                    f"{output} exists and is not the output of a quantkit run; choose another --output or remove it"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")  # noqa: SIM115  (held until close)
        except OSError as error:
            raise output_error(output, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise OutputError(
                f"{output} is in use by another quantkit process; wait for it or stop it"
            ) from error
        try:
            self.entries = self._open(identity, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, identity: dict, resume: bool) -> list[dict]:
        lines = read_lines(self.file)
        if lines:
            refuse_other(self.output, lines[0], identity, resume)
            if resume:
                self._rewrite(lines)
                return lines[1:]
        for pattern in ("model-*.safetensors*", "*.json", "*.tmp"):
            for old in self.output.glob(pattern):
                old.unlink()
        self._rewrite([identity])
        return []

    def _rewrite(self, lines: list[dict]) -> None:
        """Drop a torn last line, so that the next append starts on a line of its own."""
        temporary = self.file.with_suffix(".tmp")
        try:
            with open(temporary, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.file)
            sync_folder(self.folder)
        except OSError as error:
            raise output_error(self.file, error) from error

    def append(self, entry: dict) -> None:
        """Add one finished step, durably."""
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise output_error(self.file, error) from error
        self.entries.append(entry)

    def forget_after(self, count: int) -> None:
        """Keep only the first `count` entries (what they describe is gone)."""
        first = read_lines(self.file)[0]
        self.entries = self.entries[:count]
        self._rewrite([first, *self.entries])

    def streams(self, block: int) -> Path:
        """Where the hidden states at the input of `block` are kept."""
        return self.folder / f"streams-{block:05d}.safetensors"

    def drop_streams(self, keep: int | None) -> None:
        """Remove all kept hidden states but those at the input of block `keep`."""
        for file in self.folder.glob("streams-*"):
            if keep is None or file != self.streams(keep):
                file.unlink()

    def close(self) -> None:
        self._lock.close()

    def remove(self) -> None:
        """The run is complete: the journal goes."""
        self.close()
        shutil.rmtree(self.folder)


def read_lines(file: Path) -> list[dict]:
    """The complete lines of a journal; a torn last one is dropped."""
    lines: list[dict] = []
    if file.exists():
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                with contextlib.suppress(json.JSONDecodeError):
                    lines.append(json.loads(line))
    return lines


def differences(stored: object, given: object, at: str = "") -> list[str]:
    """'path: stored value -> given value' for every leaf in which two JSON values differ."""
    if isinstance(stored, dict) and isinstance(given, dict):
        keys = sorted(stored.keys() | given.keys())
        return [d for k in keys for d in differences(stored.get(k), given.get(k), f"{at}.{k}" if at else k)]
    return [] if stored == given else [f"{at}: {_short(stored)} -> {_short(given)}"]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:24] + "..."


def refuse_other(output: Path, stored: dict, given: dict, resume: bool) -> None:
    """OutputError naming what differs when `output` belongs to another run."""
    different = differences(stored, given)
    if different and resume:
        raise OutputError(
            f"{output} belongs to another run; what differs (there -> now):\n  "
            + "\n  ".join(different)
            + "\nchoose another --output, or start over with --no-resume"
        )
