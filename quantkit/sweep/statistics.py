"""The statistics of the original model that the cells of a sweep share: which cells need them, and where they are kept.

They are collected once for each calibration text and kept in a folder named after what decides them. Cells that cannot
use them exactly are made as if there were none (`quantkit.pipeline.statistics`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.calibration.kept_statistics import INDEX, KeptStatistics, merge, open_statistics
from quantkit.errors import DataError
from quantkit.pipeline.progress import Silent
from quantkit.pipeline.quantize import prepared
from quantkit.pipeline.statistics import RECIPE, collect_statistics
from quantkit.plan import Plan
from quantkit.recipe.recipe import Recipe


def wants(recipe: Recipe, plan: Plan) -> bool:
    """Whether a cell could use statistics of the original model, looking at its recipe alone."""
    if any(getattr(each, "statistics", None) for each in recipe.transforms) or plan.on_original:
        return True
    return not plan.follows_quantized and any(layer.algorithm.needs for layer in plan.layers)


def folder_of(
    given: Sequence[str | Path],
    output: Path,
    recipe: Mapping[str, Any],
    model: str,
    data: Sequence[str],
    device: str,
) -> Path:
    """Where a cell's statistics are, or will be.

    given: what the user named: nothing, then they are below the sweep's folder; a folder to keep them in; or finished
    sets, which are used whatever the cell's text is, several added up.
    """
    sets = [Path(each) for each in given]
    if sets and all((each / INDEX).is_file() for each in sets):
        return (
            sets[0] if len(sets) == 1 else output / "statistics" / f"merged-{_digest([str(s) for s in sets])}"
        )
    if len(sets) > 1:
        missing = next(each for each in sets if not (each / INDEX).is_file())
        raise DataError(
            f"{missing} holds no finished statistics ({INDEX} is missing); give finished ones, or one folder"
        )
    place = sets[0] if sets else output / "statistics"
    calibration = {key: value for key, value in recipe["calibration"].items() if key != "data"}
    return place / _digest([model, calibration, list(data), device, __version__])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def ready(
    folder: Path,
    given: Sequence[str | Path],
    calibration: Mapping[str, Any],
    model: str,
    device: str,
    told: Callable[[str], None],
) -> KeptStatistics:
    """The set in a folder, collected or added up now if it is not there yet."""
    if (folder / INDEX).is_file():
        return open_statistics(folder)
    if len(given) > 1:
        told(f"adding up {len(given)} sets of statistics")
        return merge([open_statistics(Path(each)) for each in given], folder)
    told("collecting statistics of the original model, once for all cells that can use them")
    run = prepared(RECIPE | {"calibration": calibration}, model, folder, (), device, None, Silent())
    return collect_statistics(run, folder)
