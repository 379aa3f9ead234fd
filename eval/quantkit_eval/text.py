"""Evaluation text: files, Hugging Face datasets by name, local dataset folders; read as far as it is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quantkit_eval.dataset import is_saved, reader
from quantkit_eval.errors import EvalError

DOCUMENTS = "\n\n"  # between rows, empty ones too, as WikiText-2 perplexities are measured
_FIELD = "text"
_PIECE = 1 << 20  # characters, or rows of a dataset / 1000, read at a time


def load_text(sources: str | Path | Iterable[str | Path]) -> str:
    """All sources as one text, joined by a blank line, as are the rows of a dataset.

    A source is a UTF-8 file, a local dataset folder (its test split, else its first), or
    `hf:name[:config[:split]]` (split: test by default). EvalError names a source that is missing, empty or
    unreadable.
    """
    return Text(sources).whole()


class Text:
    """The sources of `load_text` as one text of which only the beginning is kept in memory.

    It is read once, from front to end: as much of it as is asked for, and at last the rest for its digest.
    """

    def __init__(self, sources: str | Path | Iterable[str | Path]) -> None:
        self.sources = [sources] if isinstance(sources, str | Path) else list(sources)
        if not self.sources:
            raise EvalError("no evaluation text was given; name a file or hf:name[:config[:split]]")
        check_sources(self.sources)
        self._pieces = _pieces([str(source) for source in self.sources])
        self._sha256 = hashlib.sha256()
        self._kept: list[str] = []
        self._length = 0

    def start(self, characters: int) -> tuple[str, bool]:
        """(the first so many characters, whether that is the whole text)."""
        while self._length <= characters and (piece := self._next()) is not None:
            self._kept.append(piece)
            self._length += len(piece)
        self._kept = ["".join(self._kept)]
        return self._kept[0][:characters], self._length <= characters

    def whole(self) -> str:
        """All of it."""
        while (piece := self._next()) is not None:
            self._kept.append(piece)
        return "".join(self._kept)

    def sha256(self) -> str:
        """Digest (hex) of the whole text in UTF-8; what has not been read yet passes by piece by piece."""
        while self._next() is not None:
            pass
        return self._sha256.hexdigest()

    def _next(self) -> str | None:
        piece = next(self._pieces, None)
        if piece is not None:
            self._sha256.update(piece.encode())
        return piece


def check_sources(sources: Iterable[str | Path]) -> None:
    """EvalError for a source that is no file, no folder and not `hf:name[:config[:split]]`; nothing is read."""
    for source in map(str, sources):
        if source.startswith("hf:"):
            _hub_name(source)
        elif not _exists(source):
            raise EvalError(
                f"no evaluation text {source}: no file, no folder, and not hf:name[:config[:split]]"
            )


def source_name(source: str | Path) -> str:
    """How a report names it: without the folders, which differ from machine to machine."""
    return str(source) if str(source).startswith("hf:") else Path(source).name


def _pieces(sources: list[str]) -> Iterator[str]:
    """The joined text in pieces. EvalError for a source without text."""
    for number, source in enumerate(sources):
        if number:
            yield DOCUMENTS
        empty = True
        folder = Path(source).expanduser() if not source.startswith("hf:") else None
        for piece in _file(folder) if folder and not folder.is_dir() else _dataset(source, folder):
            empty = empty and not piece.strip()
            yield piece
        if empty:
            raise EvalError(f"evaluation text {source} is empty")


def _exists(source: str) -> bool:
    """Whether the path is a file or a folder; a path the system does not take (a NUL, too long) is neither."""
    try:
        path = Path(source).expanduser()
        return path.is_file() or path.is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def _file(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(_PIECE):
                if "\0" in piece:
                    raise EvalError(f"{path} holds NUL characters, so it is no text; give a text file")
                yield piece
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is not UTF-8 text ({error}); convert it first") from None
    except OSError as error:
        raise EvalError(f"{path} cannot be read: {error.strerror or error}") from None


def _dataset(source: str, folder: Path | None) -> Iterator[str]:
    """Rows of a dataset and what joins them; `folder` is None for a dataset of the hub."""
    with reader(source, EvalError) as datasets:
        rows = _hub_rows(datasets, source) if folder is None else _folder_rows(datasets, folder)
        if _FIELD not in rows.column_names:
            raise EvalError(f"dataset {source} has no field {_FIELD!r} but {', '.join(rows.column_names)}")
        first = True
        for batch in rows.select_columns([_FIELD]).iter(batch_size=_PIECE // 1000):
            documents = batch[_FIELD]
            if not all(isinstance(document, str) for document in documents):
                raise EvalError(f"dataset {source}: the field {_FIELD!r} holds something other than text")
            yield ("" if first else DOCUMENTS) + DOCUMENTS.join(documents)
            first = False


def _hub_name(source: str) -> tuple[str, str, str]:
    """(name, config, split) of `hf:name[:config[:split]]`, "" for what is left out."""
    name, *rest = source.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise EvalError(f"{source} is not of the form hf:name[:config[:split]]")
    config, split = (*rest, "", "")[:2]
    return name, config, split


def _hub_rows(datasets: Any, source: str) -> Any:
    name, config, split = _hub_name(source)
    return datasets.load_dataset(name, config or None, split=split or "test")


def _folder_rows(datasets: Any, folder: Path) -> Any:
    load = datasets.load_from_disk if is_saved(folder) else datasets.load_dataset
    data = load(str(folder))
    if isinstance(data, dict):
        return data["test"] if "test" in data else next(iter(data.values()))
    return data
