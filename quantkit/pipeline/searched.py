"""A recipe whose bits are searched: measure, choose, quantize, look at the evaluation, and give more bits if it fails.

What is made is made by an ordinary recipe with a rule for every group, which is written beside the checkpoint: a search
leaves no other trace in the files. Attempts are made in the state folder, OUT/.quantkit, whose journal has a line for
everything that was found. The one to keep is moved to OUT, its manifest last; so a search that is killed goes on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.allocation.escalation import next_choice
from quantkit.allocation.explicit import to_yaml
from quantkit.allocation.gate import judge
from quantkit.checkpoint.journal import Journal, discard, refuse_other
from quantkit.checkpoint.manifest import (
    ALLOCATION,
    MANIFEST,
    RECIPE,
    read_manifest,
    read_sealed,
    write_sealed,
)
from quantkit.checkpoint.stream_files import FOLDER
from quantkit.device import launch
from quantkit.errors import OutputError, RunError, UserError
from quantkit.files import sync_folder, write_atomically
from quantkit.pipeline.progress import Progress, Silent
from quantkit.pipeline.publish import files_of
from quantkit.pipeline.quantize import Result, prepared, quantize
from quantkit.pipeline.report import RunReport
from quantkit.pipeline.run import Run, beyond
from quantkit.pipeline.search_state import Attempt, State
from quantkit.recipe.recipe import Recipe, load_recipe

SCHEMA = "quantkit-allocation/1"


@dataclass(frozen=True)
class Call:
    """The arguments of `quantize` that every attempt is made with."""

    model: str | Path | None
    device: str
    evaluate: bool
    progress: Progress | None
    eval_tokens: int | None
    eval_text: str | Path | Sequence[str | Path] | None

    def quantized(self, recipe: Recipe, output: Path) -> Result:
        """One attempt, or the one that lies there already, verified."""
        return quantize(
            recipe,
            self.model,
            output,
            device=self.device,
            evaluate=self.evaluate,
            progress=self.progress,
            eval_tokens=self.eval_tokens,
            eval_text=self.eval_text,
        )


def quantize_searched(
    recipe: Any, call: Call, output: str | Path | None, overrides: Sequence[str], resume: bool
) -> Result:
    """`quantize` of a recipe with a target of size or a gate. Result.failed says so if the gate could not be passed."""
    if launch().size > 1:
        raise UserError(
            "a target of size and a gate are searched for in one process; run without torchrun, or run with it the "
            f"recipe that a search has written, {RECIPE}"
        )
    asked = (call.eval_tokens, call.eval_text) if call.evaluate else None
    run = prepared(recipe, call.model, output, overrides, call.device, asked, call.progress or Silent())
    if run.recipe.gate is not None and not call.evaluate:
        raise UserError("a gate is judged by the evaluation; leave out --no-eval, or remove the gate")
    identity = _identity(run)
    if resume and (run.output / MANIFEST).exists():
        return _finished(run, call, identity)
    if run.recipe.gate is not None and (reason := beyond(run)):
        raise UserError(f"a gate is judged by the evaluation: {reason}")
    if not resume:
        shutil.rmtree(run.output / FOLDER / _attempt_folder(0).parent.name, ignore_errors=True)
    journal = Journal(run.output, identity, resume, files_of(run))
    try:
        search = _Search(run, call, journal)
        best = search.best()
        search.keep(best, identity)
        journal.remove()
    finally:
        journal.close()
    return _told(run.output)


def _identity(run: Run) -> dict[str, Any]:
    """What decides what a search finds."""
    resolved = run.recipe.resolved()
    asked: dict[str, Any] = {key: resolved.get(key) for key in ("target", "gate")}
    if run.recipe.gate is not None and run.request is not None:
        asked["evaluation"] = {"tokens": run.request.tokens, "text": list(run.request.text)}
    return run.identity | {"search": asked}


def _finished(run: Run, call: Call, identity: dict[str, Any]) -> Result:
    """The result of a search that has ended, verified again, and evaluated as asked now."""
    folder = run.output
    if not (folder / ALLOCATION).exists():
        refuse_other(folder, read_manifest(folder).identity, identity)
    record = read_sealed(folder / ALLOCATION)
    refuse_other(folder, record["identity"], identity)
    discard(folder)
    made = call.quantized(load_recipe(folder / RECIPE), folder)
    result = _told(folder)
    return replace(result, failed=made.failed or result.failed)


def _attempt_folder(number: int) -> Path:
    return Path("attempts") / str(number)


def _told(folder: Path) -> Result:
    """The result of the checkpoint in a folder, with what the search has found among the notes."""
    manifest, record = read_manifest(folder), read_sealed(folder / ALLOCATION)
    report = RunReport.of(folder, manifest)
    notes = [
        *report.notes,
        *record["notes"],
        f"the recipe that makes it without searching: {folder / RECIPE}",
    ]
    failed = None
    if not record["passed"]:
        missed = "; ".join(record["missed"])
        failed = f"the gate is not passed: {missed}; {record['why']}, and the best attempt is in {folder}"
        notes.append(failed)
    return Result(folder, replace(report, notes=notes), manifest, failed)


class _Search:
    """One search. state: what was found, which its journal has, too."""

    def __init__(self, run: Run, call: Call, journal: Journal) -> None:
        self.run, self.call, self.journal = run, call, journal
        self.state = State(run, journal)

    def best(self) -> Attempt:
        """Make attempts until one passes or nothing larger is allowed; the best of them."""
        state, gate = self.state, self.run.recipe.gate
        moving = state.moving
        if moving is not None:
            return moving
        while True:
            last = state.attempts[-1] if state.attempts else None
            if last is None:
                chosen, cache = state.first()
            elif gate is None or last.passed:
                return last
            else:
                following = next_choice(
                    state.found, state.damages(), last.chosen, last.excess, state.most(last.cache)
                )
                if following is None:
                    return min(state.attempts, key=lambda one: one.excess)
                chosen, cache = following, last.cache
                self.run.progress.message(f"the gate is not passed ({last}); trying more bits")
            self._make(len(state.attempts), chosen, cache)

    def _make(self, number: int, chosen: list[int], cache: str | None) -> None:
        state, run = self.state, self.run
        bits = state.found.bits_per_weight(chosen)
        run.progress.message(
            f"attempt {number + 1}: {bits:.3f} bits per weight{f', KV cache {cache}' if cache else ''}"
        )
        result = self.call.quantized(state.explicit(chosen, cache), self._folder(number))
        checks = []
        if run.recipe.gate is not None:
            evaluation = result.manifest.evaluation
            if evaluation is None:
                raise RunError(
                    f"the gate cannot be judged: {result.failed or '; '.join(result.report.notes[-1:])}"
                )
            checks = judge(run.recipe.gate, evaluation)
        state.attempted(Attempt(number, list(chosen), cache, bits, state.predicted(chosen), checks))
        for worse in sorted(state.attempts, key=lambda one: (not one.passed, one.excess))[1:]:
            shutil.rmtree(self._folder(worse.number), ignore_errors=True)

    def _folder(self, number: int) -> Path:
        return self.run.output / FOLDER / _attempt_folder(number)

    def keep(self, attempt: Attempt, identity: dict[str, Any]) -> None:
        """Move an attempt out of the state folder, with its recipe; the manifest, which makes it a checkpoint, last."""
        output, source = self.run.output, self._folder(attempt.number)
        explicit = self.state.explicit(attempt.chosen, attempt.cache)
        if self.state.moving is None:
            if not (source / MANIFEST).exists():
                self.call.quantized(explicit, source)
            self.state.moved(attempt)
        model = self.run.recipe.model or self.call.model
        command = f"quantkit quantize {RECIPE}" + ("" if model is None else " --model PATH")
        text = to_yaml(explicit, command, " and ".join(self.run.recipe.searched))
        write_atomically(output / RECIPE, iter([text.encode()]))
        record = self.state.record(attempt)
        write_sealed(output / ALLOCATION, {"schema": SCHEMA, "identity": identity} | record)
        files = [
            file
            for file in sorted(source.rglob("*"))
            if file.is_file() and FOLDER not in file.parts[len(source.parts) :]
        ]
        try:
            for file in sorted(files, key=lambda file: file.name == MANIFEST):
                into = output / file.relative_to(source)
                into.parent.mkdir(parents=True, exist_ok=True)
                if file.name == MANIFEST:
                    sync_folder(output)
                os.replace(file, into)
        except OSError as error:
            raise OutputError(f"{output}: {error.strerror or error}") from error
        sync_folder(output)
