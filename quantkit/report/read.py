"""JSON files of other verbs -> `Results`. What cannot be read is refused by name, never left out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from quantkit_eval.explanation import Explanation
from quantkit_eval.report import Report

from quantkit.checkpoint.manifest import MANIFEST, RUN, read_facts, read_manifest
from quantkit.checkpoint.records import parse
from quantkit.errors import UserError
from quantkit.models.json_reader import read_json
from quantkit.paths import user_path
from quantkit.report.results import Bench, Checkpoint, Evaluation, Planned, Results, Source, Sweep

Value = TypeVar("Value")
AGAIN = "write it again"


def read_results(paths: Sequence[str | Path]) -> Results:
    """Checkpoint folders and JSON files, in their order; UserError for what is missing, damaged or no result."""
    results = Results()
    for path in paths:
        file = user_path(path, UserError)
        if file.is_dir():
            file = file / MANIFEST
            if not file.is_file():
                raise UserError(
                    f"{path} has no {MANIFEST}; give the folder of a finished checkpoint or a JSON file"
                )
        if not file.is_file():
            raise UserError(
                f"{path} does not exist; give a JSON report or the folder of a finished checkpoint"
            )
        _read(file, results)
    return results


def _read(file: Path, results: Results) -> None:
    value: dict[str, Any] = read_json(file, UserError, advice=AGAIN)
    schema = str(value.get("schema"))
    reader = READERS.get(schema)
    if reader is None:
        known = ", ".join(READERS)
        raise UserError(
            f"{file} has the schema {schema!r}, which is no result that a page shows; known are {known}"
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    results.sources.append(Source(str(file), schema, digest))
    reader(file, value, results)


def _parsed(kind: type[Value], value: Any, file: Path) -> Value:
    try:
        return parse(kind, value)
    except ValueError as wrong:
        raise UserError(f"{file} has no proper entry for {wrong}; {AGAIN}") from None


def _checkpoint(file: Path, _: Mapping[str, Any], results: Results) -> None:
    folder = file.parent
    if file.name != MANIFEST:
        raise UserError(f"{file} must keep its name, {MANIFEST}; give the folder of the checkpoint")
    facts = read_facts(folder) if (folder / RUN).is_file() else None
    name = folder.resolve().name
    results.checkpoints.append(Checkpoint(name, read_manifest(folder, UserError), facts))


def _run(file: Path, value: Mapping[str, Any], results: Results) -> None:
    """`quantize --json`, or `quantkit.run.json`: both lead to the checkpoint, which says more."""
    folder = file.parent if file.name == RUN else Path(str(value.get("output")))
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{file} is of the checkpoint {folder}, which is not there; give the folder where it is now"
        )
    _checkpoint(folder / MANIFEST, {}, results)


def _evaluation(file: Path, value: Mapping[str, Any], results: Results) -> None:
    explanation = value.get("explanation")
    names = {key: value.get(key) for key in ("model", "baseline")}
    results.evaluations.append(
        Evaluation(
            file.stem,
            _parsed(Report, value, file),
            None if explanation is None else _parsed(Explanation, explanation, file),
            **{key: None if each is None else str(each) for key, each in names.items()},
        )
    )


def _sweep(file: Path, value: Mapping[str, Any], results: Results) -> None:
    sweep = _parsed(Sweep, value, file)
    for other in results.sweeps:
        if other.model_digest != sweep.model_digest:
            raise UserError(
                f"{file} is a sweep of another model ({sweep.model}) than {other.name} ({other.model}), so their "
                "numbers cannot stand in one table; give sweeps of one model"
            )
    results.sweeps.append(sweep)


def _bench(file: Path, value: Mapping[str, Any], results: Results) -> None:
    results.benches.append(_parsed(Bench, value, file))


def _plan(file: Path, value: Mapping[str, Any], results: Results) -> None:
    results.plans.append(replace(_parsed(Planned, value, file), name=file.stem))


READERS: dict[str, Callable[[Path, Mapping[str, Any], Results], None]] = {
    "quantkit/2": _checkpoint,
    "quantkit/1": _checkpoint,
    "quantkit-run/1": _run,
    "quantkit-eval/1": _evaluation,
    "quantkit-sweep/1": _sweep,
    "quantkit-bench/1": _bench,
    "quantkit-plan/1": _plan,
}
