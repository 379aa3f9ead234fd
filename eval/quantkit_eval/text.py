"""Evaluation text: files, Hugging Face datasets by name, local dataset folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantkit_eval.errors import EvalError

DOCUMENTS = "\n\n"  # between documents, as WikiText-2 perplexities are usually measured


def load_text(sources: str | Path | Iterable[str | Path]) -> str:
    """All sources as one text, documents joined by a blank line.

    A source is a UTF-8 file, a local dataset folder, or `hf:name[:config[:split]]` (split: test by default).
    EvalError names a source that is missing, empty or unreadable.
    """
    several = [sources] if isinstance(sources, str | Path) else list(sources)
    if not several:
        raise EvalError("no evaluation text was given; name a file or hf:name[:config[:split]]")
    return DOCUMENTS.join(_one(str(source)) for source in several)


def _one(source: str) -> str:
    path = Path(source).expanduser()
    if source.startswith("hf:") or path.is_dir():
        text = DOCUMENTS.join(_rows(source))
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise EvalError(f"{source} is not UTF-8 text: {error}; convert it first") from None
    else:
        raise EvalError(
            f"no evaluation text {source}: not a file, not a folder, and not hf:name[:config[:split]]"
        )
    if not text.strip():
        raise EvalError(f"{source} holds no text")
    return text


def _rows(source: str) -> Iterable[str]:
    try:
        import datasets
    except ImportError:
        raise EvalError(f"{source} needs the package `datasets`; install it or give a text file") from None
    try:
        data = _open(datasets, source)
    except Exception as error:  # the library raises whatever its backends raise
        reason = " ".join(str(error).split())[:300]
        raise EvalError(f"dataset {source} cannot be read: {reason}") from error
    if "text" not in data.column_names:
        raise EvalError(f"dataset {source} has no field 'text' but {', '.join(data.column_names)}")
    return [row for row in data["text"] if row]


def _open(datasets: Any, source: str) -> Any:
    if source.startswith("hf:"):
        name, config, split = [*source[3:].split(":"), None, None][:3]
        return datasets.load_dataset(name, config or None, split=split or "test")
    folder = Path(source)
    saved = (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()
    data = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    if not hasattr(data, "column_names") or isinstance(data.column_names, dict):
        data = data["test"] if "test" in data else data[next(iter(data))]
    return data
