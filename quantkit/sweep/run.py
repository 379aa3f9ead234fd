"""A sweep from beginning to end: every cell made and measured once, then one report.

    OUTPUT/cells/ID.json     a finished cell, written whole when it is finished; a killed sweep goes on behind these
    OUTPUT/work/             checkpoints that cells still need; `keep` leaves them there
    OUTPUT/sweep.json        the report (`table.py`), written at the end, and after every cell that came before

A cell's file has a key that says what decides its result (recipe, model, text, code); a file with another key is made
again. Each cell runs in a process of its own, so that its peak memory is its own and a cell that is killed for its
memory costs that cell only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit_eval.text import Text

from quantkit import __version__, assets
from quantkit.calibration.kept_statistics import INDEX, open_statistics
from quantkit.checkpoint.manifest import read_sealed, write_sealed
from quantkit.device import find_device
from quantkit.errors import OutputError, RunError, VerificationError
from quantkit.files import output_error, write_json
from quantkit.models.headers import Headers, read_checkpoint, resolve_model
from quantkit.models.source import Source
from quantkit.paths import weights_path
from quantkit.pipeline.evaluation import CONTEXT, EvaluationRequest
from quantkit.report.page import write_page
from quantkit.sweep.cell import SCHEMA, Job, run_alone, run_cell
from quantkit.sweep.grid import Sweep, load_sweep, parse_sweep
from quantkit.sweep.share import Planned, in_order, plan_cells
from quantkit.sweep.statistics import folder_of, ready, wants
from quantkit.sweep.table import Found, report

REPORT = "sweep.json"
Told = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What the cells of a sweep have in common.

    digest: of the model's files. text_digest: of the evaluated text. keep: leave the checkpoints. share: make
    once what several cells need. statistics: where those of the original model are, or are to be.
    """

    sweep: Sweep
    headers: Headers
    folder: Path
    device: str
    digest: str
    text_digest: str
    window: int
    keep: bool
    share: bool
    statistics: tuple[str | Path, ...]

    @property
    def name(self) -> str:
        return Path(self.headers.name).name


def sweep(
    asked: Sweep | str | Path | Mapping[str, Any],
    model: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    keep: bool = False,
    share: bool = True,
    isolated: bool = False,
    statistics: Sequence[str | Path] = (),
    page: str | Path | None = None,
    told: Told = lambda line: None,
) -> dict[str, Any]:
    """Make every cell of a sweep that is not finished yet; the report, schema `quantkit-sweep/1` (docs/sweep.md).

    asked: a sweep, its YAML file, or a mapping as in the file. model: folder or hub id; default the sweep's, else the
    embedded model. output: default ./out/<model>-<name>. keep: leave the checkpoints in OUTPUT/work. share: quantize
    weights once for all cells that have the same. isolated: a process for each cell; without, peak memory is that of
    the whole sweep. statistics: a folder in which those of the original model are kept for other sweeps; or finished
    ones, used in place of the recipes' calibration text, several added up. page: where to write the report as HTML.
    told: is given a line for each cell.

    RecipeError for all mistakes of the sweep and of what does not fit the model; OutputError for a folder in use.
    RunError if a cell could not be made.
    """
    begin = time.perf_counter()
    found = asked if isinstance(asked, Sweep) else _read(asked)
    setting = _setting(found, model, output, device, keep, share, statistics)
    planned = plan_cells(found.cells, setting.headers, share)
    with _locked(setting.folder):
        made = _all_cells(setting, planned, isolated, told)
        result = report(setting.name, found, planned, made, setting.headers)
        result |= {"model_digest": setting.digest, "device": setting.device, "quantkit": __version__}
        result["statistics"] = _statistics(setting, planned)
        result["seconds"] = _seconds(planned, made, time.perf_counter() - begin)
        result["seconds"]["statistics"] = sum(each["seconds"] for each in result["statistics"])
        write_json(setting.folder / REPORT, result)
    if page is not None:
        write_page([setting.folder / REPORT], page)
    missing = [each.cell.id for each in planned if each.cell.id not in made]
    if missing:
        raise RunError(
            f"{len(missing)} of {len(planned)} cells are not finished: {', '.join(missing[:8])}; the same command "
            "makes them again"
        )
    return result


def _read(asked: str | Path | Mapping[str, Any]) -> Sweep:
    return parse_sweep(asked) if isinstance(asked, Mapping) else load_sweep(asked)


def _setting(
    found: Sweep,
    model: str | Path | None,
    output: str | Path | None,
    device: str,
    keep: bool,
    share: bool,
    statistics: Sequence[str | Path],
) -> Setting:
    """Everything the cells share, checked before anything is computed."""
    path = resolve_model(str(model) if model is not None else found.asked.model, assets.default_model())
    headers = read_checkpoint(path)
    evaluation = found.asked.evaluation
    window = evaluation.window or min(
        CONTEXT, *(cell.recipe.calibration.sequence_length for cell in found.cells)
    )
    request = EvaluationRequest.of(evaluation.tokens, evaluation.text or None, window)
    named = Path("out") / f"{Path(headers.name).name}-{found.asked.name}"
    return Setting(
        sweep=found,
        headers=headers,
        folder=weights_path(named if output is None else output, OutputError, "choose another --output"),
        device=str(find_device(device)),
        digest=Source(headers).digest(),
        text_digest=Text(request.sources).sha256(),
        window=window,
        keep=keep,
        share=share,
        statistics=tuple(statistics),
    )


def _all_cells(setting: Setting, planned: Sequence[Planned], isolated: bool, told: Told) -> dict[str, Found]:
    """The finished cells by id; those that were killed or could not be made are missing."""
    made: dict[str, Found] = {}
    jobs = {each.cell.id: _job(setting, each, planned) for each in planned}
    for each in planned:
        if (kept := _kept(jobs[each.cell.id])) is not None:
            made[each.cell.id] = kept
    if made:
        told(f"{len(made)} of {len(planned)} cells are finished already")
    order = in_order(planned)
    for number, each in enumerate(order):
        name, job = each.cell.id, jobs[each.cell.id]
        if name not in made:
            source = made.get(each.source)
            if each.shares and source is not None and source["status"] == "failed":
                _failed_with(job, source)
            else:
                if job.statistics is not None:
                    _collected(setting, job, told)
                _run(job, isolated, told)
            if (found := _kept(job)) is not None:
                made[name] = found
                told(f"[{len(made)}/{len(order)}] {name}: {_line(found, each)}")
        needed = {later.source for later in order[number + 1 :] if later.cell.id not in made}
        if each.source not in needed and not setting.keep and name in made:
            shutil.rmtree(job.folder, ignore_errors=True)
    if not setting.keep:
        with contextlib.suppress(OSError):
            (setting.folder / "work").rmdir()
    return made


def _job(setting: Setting, each: Planned, planned: Sequence[Planned]) -> Job:
    """What makes a cell, with the key of its result."""
    asked, cell = setting.sweep.asked, each.cell
    maker = next(one.cell for one in planned if one.cell.id == each.source)
    recipe = maker.recipe.resolved() | {"model": None}
    data, device = _data_digests(recipe), setting.device.partition(":")[0]
    made_of: dict[str, Any] = {
        "recipe": recipe,
        "model": setting.digest,
        "data": data,
        "code": __version__,
        "device": device,
    }
    kept = None
    if wants(maker.recipe, each.plan) and (setting.share or setting.statistics):
        given = setting.statistics
        kept = folder_of(given, setting.folder, recipe, setting.digest, data, device)
        made_of["statistics"] = str(kept) if given else kept.name
    source = _digest(made_of)
    decides = made_of | {
        "kv": None if each.plan.kv is None else str(each.plan.kv),
        "text": setting.text_digest,
        "tokens": asked.evaluation.tokens,
        "window": setting.window,
        "speed": asked.speed,
    }
    return Job(
        id=cell.id,
        key=_digest(decides),
        recipe=recipe,
        kv=each.plan.kv,
        source=each.source,
        model=str(setting.headers.path),
        folder=str(setting.folder / "work" / f"{each.source}-{source[:8]}"),
        result=str(setting.folder / "cells" / f"{cell.id}.json"),
        device=setting.device,
        digest=setting.digest,
        tokens=asked.evaluation.tokens,
        window=setting.window,
        text=asked.evaluation.text,
        speed=asked.speed,
        statistics=None if kept is None else str(kept),
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _data_digests(recipe: Mapping[str, Any]) -> list[str]:
    """What the files of calibration text hold; of a folder or a hub id, its name."""
    found = []
    for source in recipe["calibration"]["data"]:
        path = Path(source["source"])
        content = path.read_bytes() if path.is_file() else source["source"].encode()
        found.append(hashlib.sha256(content).hexdigest())
    return found


def _kept(job: Job) -> Found | None:
    """A cell as an earlier call has written it; None if there is none, or one of other inputs, or a damaged one."""
    path = Path(job.result)
    if not path.is_file():
        return None
    try:
        found = read_sealed(path)
    except VerificationError:
        return None
    wanted = {"schema": SCHEMA, "key": job.key, "id": job.id}
    return found if all(found.get(key) == value for key, value in wanted.items()) else None


def _collected(setting: Setting, job: Job, told: Told) -> None:
    """See to it that the statistics of a cell are there."""
    assert job.statistics is not None
    folder, calibration = Path(job.statistics), job.recipe["calibration"]
    ready(folder, setting.statistics, calibration, job.model, job.device, told)


def _failed_with(job: Job, source: Found) -> None:
    """Record that a cell failed because the one that makes its weights did."""
    found = {"status": "failed", "reason": source["reason"], "seconds": {"total": 0.0}}
    write_sealed(Path(job.result), {"schema": SCHEMA, "id": job.id, "key": job.key} | found)


def _run(job: Job, isolated: bool, told: Told) -> None:
    """Make one cell; a process that fails or is killed leaves it out."""
    if not isolated:
        run_cell(job)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["quantkit.sweep.cell"])
    process = context.Process(target=run_alone, args=(job,), name=f"quantkit cell {job.id}")
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()
        process.join()
        raise
    if process.exitcode and process.exitcode > 0:
        told(f"{job.id}: not made, see the message above")
    elif process.exitcode:
        told(f"{job.id}: its process was ended by signal {-process.exitcode}; perhaps memory ran out")


def _line(found: Found, each: Planned) -> str:
    """What is told of a finished cell."""
    if found["status"] != "finished":
        return f"failed: {found['reason']}"
    seconds, evaluation = found["seconds"], found["evaluation"]
    said = f"KL {evaluation['kl_mean']:.5f}, perplexity {evaluation['quantized']['perplexity']:.3f}"
    how = f"weights of {each.source}" if each.shares else f"quantized in {seconds['quantize']:.1f} s"
    return f"{said}; {how}, {seconds['total']:.1f} s in all"


def _statistics(setting: Setting, planned: Sequence[Planned]) -> list[dict[str, Any]]:
    """Which statistics of the original model served."""
    jobs = [_job(setting, each, planned) for each in planned]
    folders = dict.fromkeys(Path(job.statistics) for job in jobs if job.statistics is not None)
    found = [open_statistics(folder) for folder in folders if (folder / INDEX).is_file()]
    return [
        {
            "folder": each.folder.name,
            "data": list(each.data),
            "tokens": max(each.tokens.values(), default=0),
            "seconds": each.seconds,
            "cells": [job.id for job in jobs if job.statistics == str(each.folder)],
        }
        for each in found
    ]


def _seconds(planned: Sequence[Planned], made: Mapping[str, Found], total: float) -> dict[str, float]:
    """Where the time went. cells: of all cells' processes, in this call or an earlier one. separate: what as many
    separate runs would have taken, as quantizing the same weights takes the same time again.
    """
    cells = sum(found["seconds"]["total"] for found in made.values())
    again = sum(
        made[each.cell.id]["seconds"].get("quantize", 0.0)
        for each in planned
        if each.shares and each.cell.id in made
    )
    return {"call": total, "cells": cells, "separate": cells + again}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it for this process."""
    try:
        for each in (folder, folder / "cells", folder / "work"):
            each.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "cells" / "lock", "w")  # noqa: SIM115  (held until the end)
    except OSError as error:
        raise output_error(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"{folder} is in use by another sweep; wait for it or choose another --output"
            ) from None
        yield
