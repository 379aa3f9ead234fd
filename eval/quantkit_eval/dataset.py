"""The package `datasets`: imported only when a dataset is read, with all of its errors turned into one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any


@contextmanager
def reader(name: str, failure: type[Exception]) -> Iterator[Any]:
    """The package `datasets`, to read the dataset `name` with; every exception inside the block becomes a `failure`.

    Its readers of many formats and the network raise errors of their own. A `failure` raised inside passes unchanged.
    """
    try:
        datasets = import_module("datasets")
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
