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
from quantkit.checkpoint.verify import MANIFEST
from quantkit.errors import OutputError
from quantkit.models.json_reader import parse_json

FOLDER = ".quantkit"
CARRIED = (  # files of the source that belong to a checkpoint beside weights and config
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "LICENSE*",
)


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
            ours = self.folder.exists() or (output / MANIFEST).exists()
            if output.exists() and not ours and any(output.iterdir()):
                raise OutputError(
                    f"{output} exists and is not the output of a quantkit run; choose another --output or remove it"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")  # noqa: SIM115  (held until close)
        except OSError as error:
            raise output_error(output, error) from error
        try:
            self._take(resume)
            self.entries = self._open(identity, resume)
        except BaseException:
            self.close()
            raise

    def _take(self, resume: bool) -> None:
        """OutputError unless the lock is ours, and its file still the one in the folder."""
        in_use = OutputError(f"{self.output} is in use by another quantkit process; wait for it or stop it")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self._lock.name))
        except OSError as error:
            raise in_use from error
        if not there or (resume and (self.output / MANIFEST).exists()):  # it has finished in between
            raise in_use

    def _open(self, identity: dict, resume: bool) -> list[dict]:
        lines = read_lines(self.file)
        if lines and resume:
            refuse_other(self.output, lines[0], identity)
            self._clear(("*.tmp",))
            self._rewrite(lines)
            return lines[1:]
        # the manifest first: a folder that holds it is finished
        self._clear((MANIFEST, "config.json", "*.json", "model-*.safetensors", *CARRIED, "*.tmp"))
        self.drop_streams(None)
        self._rewrite([identity])
        return []

    def _clear(self, patterns: tuple[str, ...]) -> None:
        try:
            for pattern in patterns:
                for old in self.output.glob(pattern):
                    old.unlink()
        except OSError as error:
            raise output_error(self.output, error) from error

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
        """The run is complete: the journal goes, and the lock with it."""
        discard(self.output)
        self.close()


def discard(output: Path) -> None:
    """Remove the journal of a finished run; what cannot be removed does no harm beside a manifest."""
    shutil.rmtree(output / FOLDER, ignore_errors=True)


def read_lines(file: Path) -> list[dict]:
    """The lines of a journal up to the first that is torn."""
    lines: list[dict] = []
    if file.exists():
        with contextlib.suppress(OutputError):
            for line in file.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    lines.append(parse_json(line, str(file), OutputError))
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


def refuse_other(output: Path, stored: dict, given: dict) -> None:
    """OutputError naming what differs when `output` belongs to another run."""
    different = differences(stored, given)
    if different:
        raise OutputError(
            f"{output} belongs to another run; what differs (there -> now):\n  "
            + "\n  ".join(different)
            + "\nchoose another --output, or start over with --no-resume"
        )
