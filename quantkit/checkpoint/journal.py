"""The journal of a run: what is finished, so that the same command continues after a kill.

`OUT/.quantkit/journal.jsonl` holds one step per line: first what the run is made of (recipe, model, data, code) and
the files it is going to write, then one line per finished shard. Each line is a JSON object behind its checksum, which
covers the number of the line too. A line is appended, flushed and synced only after the shard's rename. A last line
without an end is the trace of a kill and is dropped; from a line with a wrong checksum on the journal is cut, and the
run says so. Beside the journal lie the hidden states at the input of the next block, when the run needs them, and what
a search has found before the first block.

Starting over deletes what the journal or the manifest names, and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantkit.checkpoint.manifest import MANIFEST, inside, read_sealed, recorded, write_sealed
from quantkit.checkpoint.stream_files import FOLDER, StreamFiles
from quantkit.errors import OutputError
from quantkit.files import check_numbers, output_error, sync_folder
from quantkit.models.json_reader import parse_json

SEARCH = "search.json"
START_OVER = "start over with --no-resume, or choose another --output"
_SUM = 32  # hex digits of a line's checksum


class Journal:
    """Open the journal of `output` for a run made of `identity` (a flat JSON-able dict) that writes the files `writes`.

    resume: continue finished work of the same run; otherwise start over. entries: the finished shards. cut: what a
    user should know about lines that were damaged, or None. OutputError if the folder belongs to a run with another
    identity (naming what differs), is in use by another process, holds foreign files, or if a file of another
    origin has the name of one that the run would write. streams: the files of the hidden states; None: those of a run
    in one process.
    """

    def __init__(
        self,
        output: Path,
        identity: dict[str, Any],
        resume: bool = True,
        writes: Iterable[str] = (),
        streams: StreamFiles | None = None,
    ) -> None:
        self.output = output
        self.folder = output / FOLDER
        self.file = self.folder / "journal.jsonl"
        self.streams = streams or StreamFiles(output)
        self.cut: str | None = None
        try:
            ours = self.folder.exists() or (output / MANIFEST).exists()
            if output.exists() and not ours and any(output.iterdir()):
                raise OutputError(
                    f"{output} exists and is not the output of a quantkit run; choose another --output or remove it"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.folder.is_symlink():
                raise OutputError(f"{self.folder} is a symbolic link; remove it or choose another --output")
            self._lock = open(self.folder / "lock", "w")  # noqa: SIM115  (held until close)
        except OSError as error:
            raise output_error(output, error) from error
        try:
            self._take(resume)
            self.entries: list[dict[str, Any]] = []
            self._open(identity, resume, sorted(writes))
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

    def _open(self, identity: dict[str, Any], resume: bool, writes: list[str]) -> None:
        lines, damage = read_lines(self.file)
        if resume and damage and not lines:
            raise OutputError(f"{damage}, and so which run {self.output} belongs to is lost; {START_OVER}")
        first = {"identity": identity, "writes": writes}
        if lines and resume:
            refuse_other(self.output, lines[0]["identity"], identity)
            known = _named(lines)
            self._refuse_foreign(writes, known)
            self._delete({f"{name}.tmp" for name in known})
            self.entries = lines[1:]
            if damage:
                self.cut = f"{damage}; what it said from there on is made again"
        else:
            known = _named(_all_sound(self.file)) | recorded(self.output)
            self._refuse_foreign(writes, known)
            # the manifest first: a folder that holds it is finished
            self._delete({MANIFEST} & known)
            self._delete({*known, *(f"{name}.tmp" for name in known)})
            self.streams.drop_all()
            (self.folder / SEARCH).unlink(missing_ok=True)
        self._rewrite([first, *self.entries])

    def _refuse_foreign(self, writes: Iterable[str], known: set[str]) -> None:
        """OutputError naming files that the run would write over and that no run of quantkit recorded."""
        taken = [name for name in writes if name not in known and os.path.lexists(self.output / name)]
        if taken:
            raise OutputError(
                f"{self.output} holds files that quantkit did not write and that this run would replace: "
                f"{', '.join(taken[:8])}; move them away or choose another --output"
            )

    def _delete(self, names: Iterable[str]) -> None:
        """Remove files of the output folder, and the folders below it that this leaves empty."""
        try:
            for name in sorted(names):
                path = self.output / name
                if inside(name) and os.path.lexists(path) and not _through_link(self.output, name):
                    path.unlink()
                    if path.parent != self.output:
                        with contextlib.suppress(OSError):
                            path.parent.rmdir()
        except OSError as error:
            raise output_error(self.output, error) from error

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        """Write all lines anew, so that the next append starts on a line of its own."""
        temporary = self.file.with_suffix(".tmp")
        try:
            with open(temporary, "w") as file:
                file.writelines(_line(number, line) for number, line in enumerate(lines))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.file)
            sync_folder(self.folder)
        except OSError as error:
            raise output_error(self.file, error) from error

    def append(self, entry: dict[str, Any]) -> None:
        """Add one finished step, durably."""
        check_numbers(entry.get("layers", []), "layers")
        check_numbers(entry.get("scaling", []), "scaling")
        try:
            with open(self.file, "a") as file:
                file.write(_line(len(self.entries) + 1, entry))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise output_error(self.file, error) from error
        self.entries.append(entry)

    def forget_after(self, count: int) -> None:
        """Keep only the first `count` entries (what they describe is gone)."""
        lines, _ = read_lines(self.file)
        self.entries = self.entries[:count]
        self._rewrite([lines[0], *self.entries])

    def beside(self, part: int, name: str) -> Path:
        """The file of an expert that waits for its block, `part`, to be finished."""
        return self.folder / f"expert-{part}-{name}.safetensors"

    def drop_beside(self, part: int) -> None:
        """Remove the files of the experts of a block."""
        for file in self.folder.glob(f"expert-{part}-*"):
            file.unlink()

    def kept(self) -> dict[str, Any] | None:
        """What a search has found before the first block; None if nothing is kept, or it is damaged."""
        with contextlib.suppress(OutputError):
            return read_sealed(self.folder / SEARCH, OutputError) if (self.folder / SEARCH).exists() else None
        return None

    def keep(self, found: dict[str, Any]) -> None:
        """Keep what a search has found, durably, for the run that goes on after an interruption."""
        write_sealed(self.folder / SEARCH, found)

    def close(self) -> None:
        self._lock.close()

    def remove(self) -> None:
        """The run is complete: the journal goes, and the lock with it."""
        discard(self.output)
        self.close()


def discard(output: Path) -> None:
    """Remove the journal of a finished run; what cannot be removed does no harm beside a manifest."""
    shutil.rmtree(output / FOLDER, ignore_errors=True)


def _line(number: int, value: dict[str, Any]) -> str:
    text = json.dumps(value, allow_nan=False)
    return f"{_sum(number, text.encode())} {text}\n"


def _sum(number: int, text: bytes) -> str:
    return hashlib.sha256(f"{number} ".encode() + text).hexdigest()[:_SUM]


def _sound(file: Path, number: int, line: bytes) -> dict[str, Any] | None:
    """The object of a line; None unless its checksum is right."""
    found, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or found != _sum(number, text[:-1]).encode():
        return None
    value: dict[str, Any] = parse_json(text, str(file), OutputError)
    return value


def read_lines(file: Path) -> tuple[list[dict[str, Any]], str | None]:
    """(the lines of a journal up to the first that is torn or damaged, what is damaged or None)."""
    sound: list[dict[str, Any]] = []
    for number, line in enumerate(_raw(file)):
        value = _sound(file, number, line)
        if value is None:
            torn = not line.endswith(b"\n") and number > 0
            return sound, None if torn else f"line {number + 1} of {file} does not match its checksum"
        sound.append(value)
    return sound, None


def _all_sound(file: Path) -> list[dict[str, Any]]:
    """Every line whose checksum is right, also behind a damaged one."""
    found = [_sound(file, number, line) for number, line in enumerate(_raw(file))]
    return [value for value in found if value is not None]


def _raw(file: Path) -> list[bytes]:
    try:
        return file.read_bytes().splitlines(keepends=True) if file.exists() else []
    except OSError as error:
        raise output_error(file, error) from error


def _named(lines: list[dict[str, Any]]) -> set[str]:
    """The files that journal lines say are written or going to be."""
    names = {name for line in lines for name in line.get("writes", ())}
    return names | {line["written"]["file"] for line in lines if "written" in line}


def _through_link(folder: Path, name: str) -> bool:
    """Whether a folder on the way to the file is a symbolic link."""
    path = folder / name
    return any(
        parent.is_symlink() for parent in path.parents if parent != folder and folder in parent.parents
    )


def differences(stored: object, given: object, at: str = "") -> list[str]:
    """'path: stored value -> given value' for every leaf in which two JSON values differ."""
    if isinstance(stored, dict) and isinstance(given, dict):
        keys = sorted(stored.keys() | given.keys())
        return [d for k in keys for d in differences(stored.get(k), given.get(k), f"{at}.{k}" if at else k)]
    return [] if stored == given else [f"{at}: {_short(stored)} -> {_short(given)}"]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:24] + "..."


def refuse_other(output: Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    """OutputError naming what differs when `output` belongs to another run."""
    different = differences(stored, given)
    if different:
        raise OutputError(
            f"{output} belongs to another run; what differs (there -> now):\n  "
            + "\n  ".join(different)
            + "\nchoose another --output, or start over with --no-resume"
        )
