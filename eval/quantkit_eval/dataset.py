"""Hugging Face datasets: the package, imported only when one is read, and one error for all that goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def reader(name: str, failure: type[Exception]) -> Iterator[Any]:
    """The package `datasets`, to open and read `name` with. Every exception of the block becomes `failure`.

    Readers of many formats and the network have errors of their own; a `failure` raised inside passes as it is.
    """
    try:
        import datasets
    except ImportError:
        raise failure(
            f"{name} needs the package `datasets`; `pip install datasets` or give a text file"
        ) from None
    try:
        yield datasets
    except failure:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise failure(
            f"dataset {name} cannot be read: {type(error).__name__}: {reason}; check name, config, split and "
            "network, or give a text file"
        ) from error


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
