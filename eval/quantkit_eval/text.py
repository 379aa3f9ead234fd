"""Evaluation text: files, Hugging Face datasets by name, local dataset folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantkit_eval.dataset import is_saved, reader
from quantkit_eval.errors import EvalError

DOCUMENTS = "\n\n"  # between rows, empty ones too, as WikiText-2 perplexities are measured
_FIELD = "text"


def load_text(sources: str | Path | Iterable[str | Path]) -> str:
    """All sources as one text, joined by a blank line, as are the rows of a dataset.

    A source is a UTF-8 file, a local dataset folder (its test split, else its first), or
    `hf:name[:config[:split]]` (split: test by default). EvalError names a source that is missing, empty or
    unreadable.
    """
    several = [sources] if isinstance(sources, str | Path) else list(sources)
    if not several:
        raise EvalError("no evaluation text was given; name a file or hf:name[:config[:split]]")
    return DOCUMENTS.join(_one(str(source)) for source in several)


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


def _one(source: str) -> str:
    check_sources([source])
    path = Path(source).expanduser()
    if source.startswith("hf:"):
        text = _dataset_text(source, None)
    elif path.is_dir():
        text = _dataset_text(source, path)
    else:
        text = _file_text(path)
    if not text.strip():
        raise EvalError(f"evaluation text {source} is empty")
    return text


def _exists(source: str) -> bool:
    """Whether the path is a file or a folder; a path the system does not take (a NUL, too long) is neither."""
    try:
        path = Path(source).expanduser()
        return path.is_file() or path.is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvalError(f"{path} is not UTF-8 text ({error}); convert it first") from None
    except OSError as error:
        raise EvalError(f"{path} cannot be read: {error.strerror or error}") from None


def _dataset_text(source: str, folder: Path | None) -> str:
    """Rows of a dataset, joined; `folder` is None for a dataset of the hub."""
    with reader(source, EvalError) as datasets:
        rows = _hub_rows(datasets, source) if folder is None else _folder_rows(datasets, folder)
    if _FIELD not in rows.column_names:
        raise EvalError(f"dataset {source} has no field {_FIELD!r} but {', '.join(rows.column_names)}")
    documents = rows[_FIELD]
    if not all(isinstance(document, str) for document in documents):
        raise EvalError(f"dataset {source}: the field {_FIELD!r} holds something other than text")
    return DOCUMENTS.join(documents)


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
