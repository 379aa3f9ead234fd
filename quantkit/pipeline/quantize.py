"""`quantize`: one call from recipe to a checkpoint that is written, verified and evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit_eval import EvalError

from quantkit import assets
from quantkit.calibration.memory import large_blocks_apart
from quantkit.calibration.text import token_windows
from quantkit.checkpoint.journal import Journal, discard, refuse_other
from quantkit.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from quantkit.checkpoint.records import Manifest
from quantkit.checkpoint.verify import verify_checkpoint
from quantkit.device import find_device
from quantkit.errors import (
    OutOfMemory,
    OutputError,
    QuantkitError,
    RecipeError,
    kept_traceback,
    memory_named,
    memory_ran_out,
)
from quantkit.formats.registry import MEMORY
from quantkit.models import skeleton
from quantkit.models.borders import quiet
from quantkit.models.headers import read_checkpoint, resolve_model
from quantkit.models.source import Source
from quantkit.models.tokenizer import open_tokenizer
from quantkit.paths import weights_path
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.disk import check_disk
from quantkit.pipeline.evaluation import EvaluationRequest, evaluate_pair
from quantkit.pipeline.model_free import evaluable
from quantkit.pipeline.produce import produce
from quantkit.pipeline.progress import Progress, Silent
from quantkit.pipeline.publish import files_of, publish, write_run_facts
from quantkit.pipeline.report import RunReport
from quantkit.pipeline.run import Run
from quantkit.pipeline.shard_writer import ShardWriter
from quantkit.pipeline.tracker import EVALUATE, VERIFY, Tracker
from quantkit.plan import build_plan
from quantkit.predict import predict
from quantkit.recipe import Recipe, load_recipe, parse_recipe, refuse_in_memory
from quantkit.validation import check_target


@dataclass(frozen=True)
class Result:
    """What a run gave.

    output: the checkpoint folder. report: what the run measured. manifest: what `quantkit.json` says. failed: why the
    closing evaluation failed, if it did; the weights are finished all the same.
    """

    output: Path
    report: RunReport
    manifest: Manifest
    failed: str | None = None


@memory_named()
@quiet(bars=False)
def quantize(
    recipe: Recipe | str | Path | Mapping[str, Any],
    model: str | Path | None = None,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    resume: bool = True,
    evaluate: bool = True,
    progress: Progress | None = None,
    eval_tokens: int | None = None,
    eval_text: str | Path | Sequence[str | Path] | None = None,
) -> Result:
    """Quantize a causal LM by a recipe and verify what was written.

    recipe: a shipped recipe's name, a YAML file, a mapping, or a `Recipe`. model: folder or hub id; default the
    recipe's, else the embedded model. output: default ./out/<model>-<recipe>. overrides: `key=value` as --set takes.
    device: auto | cpu | cuda[:n], where blocks are calibrated. resume: continue an interrupted run of the same
    inputs (a finished one is verified and its stored result returned). evaluate: also measure original and quantized
    model. eval_text: on these files, dataset folders or `hf:` names; default the embedded evaluation text.
    eval_tokens: on exactly so many tokens; default at most 65,536, fewer once the KL is known to 2 %.
    progress: who is told how far the run is (`quantkit.pipeline.progress`).

    Raises the errors of `quantkit.errors`; nothing half-written is left that looks finished. The weights are published
    before they are evaluated: an evaluation that fails is a note in the report and `Result.failed`, and the next call
    with the same inputs only evaluates.
    """
    asked = (eval_tokens, eval_text) if evaluate else None
    run = prepared(recipe, model, output, overrides, device, asked, progress or Silent())
    folder = run.output
    resumed = tracker = None
    if resume and (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        refuse_other(folder, manifest.identity, run.identity)
        verify_checkpoint(folder, manifest.files, manifest.tensors)
        discard(folder)
        run.progress.message(f"{folder} is finished; its files were verified again")
    else:
        journal = Journal(folder, run.identity, resume, files_of(run))
        try:
            if journal.cut:
                run.progress.message(journal.cut)
            resumed, tracker, found = produce(run, ShardWriter(run, journal))
            tracker.phase(VERIFY, 0.0, 0.0)
            manifest = publish(run, journal.entries, found, resumed=resumed)
            journal.remove()
            tracker.phase(VERIFY, 1.0, 0.0)
        finally:
            journal.close()
    notes: list[str] = []
    failed = None
    if run.request and not run.request.answered_by(manifest.evaluation):
        try:
            manifest, notes = _evaluate(run, run.request, manifest, resumed, tracker)
        except Exception as error:  # whatever it is, the weights are finished
            failed = f"the evaluation failed: {_reason(error)}; the weights in {folder} are finished, and the same "
            failed += "command evaluates them again"
            notes = [failed]
    run.progress.finish()
    report = RunReport.of(folder, manifest)
    return Result(folder, replace(report, notes=[*report.notes, *notes]), manifest, failed)


def _reason(error: Exception) -> str:
    """Why an evaluation failed, in one line; for what nobody foresaw, with the file that holds its traceback."""
    if memory_ran_out(error) and not isinstance(error, OutOfMemory):
        error = OutOfMemory.of(error)
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, QuantkitError | EvalError | OSError):
        return said
    name = kept_traceback(error)
    return f"unexpected {type(error).__name__}: {said}" + (f" (traceback in {name})" if name else "")


def _evaluate(
    run: Run,
    request: EvaluationRequest,
    manifest: Manifest,
    resumed: int | None,
    tracker: Tracker | None,
) -> tuple[Manifest, list[str]]:
    """Measure a published checkpoint and add the result to its manifest: (the new one, why not if it cannot be).

    resumed: None if the checkpoint was finished by an earlier run, whose facts stay.
    """
    tokenizer = run.tokenizer
    if tokenizer is None:
        tokenizer, why = evaluable(run.source.path)
        if tokenizer is None:
            return manifest, [why]
    run.progress.message("evaluating original and quantized model")
    tracker = tracker or Tracker(run, None)
    begin = run.clock.now()

    def told(done: int, total: int) -> None:
        tracker.evaluated(done, total, run.clock.now() - begin)

    with run.clock("evaluate"):
        length = run.recipe.calibration.sequence_length
        evaluation, refused = evaluate_pair(
            run.output,
            run.source.headers,
            tokenizer,
            run.device,
            length,
            request,
            digest=run.identity["model"],
            message=run.progress.message,
            progress=told,
        )
    tracker.phase(EVALUATE, 1.0, run.clock.now() - begin)
    if evaluation is not None:
        if resumed is not None:
            write_run_facts(run, manifest, resumed)
        manifest = replace(manifest, evaluation=evaluation)
        write_manifest(run.output, manifest)
    return manifest, refused


def prepared(
    recipe: Recipe | str | Path | Mapping[str, Any],
    model: str | Path | None,
    output: str | Path | None,
    overrides: Sequence[str],
    device: str,
    asked: tuple[int | None, str | Path | Sequence[str | Path] | None] | None,
    progress: Progress,
    in_memory: bool = False,
) -> Run:
    """Read and check everything a run needs, before anything is computed or written.

    asked: the number of tokens and the text of the closing evaluation, None to leave it out. in_memory: no file is
    going to be written.
    """
    if in_memory:
        overrides = [*overrides, f"output.format={MEMORY}"]
    clock = Clock()
    large_blocks_apart()
    with clock("load"):
        name, checked = _recipe(recipe, overrides)
        _refuse_misplaced(checked, in_memory)
        embedded = assets.default_model()
        path = resolve_model(str(model) if model is not None else checked.model, embedded)
        length = checked.calibration.sequence_length
        request = EvaluationRequest.of(*asked, length) if asked else None
        headers = read_checkpoint(path, checked.model_free)
        source = Source(headers)
        built = None if checked.model_free else skeleton.build(source)
        plan = build_plan(checked, headers, None if built is None else skeleton.places(built))
        check_target(checked, plan, headers)
        named = Path("out") / f"{Path(headers.name).name}-{name}"
        folder = weights_path(named if output is None else output, OutputError, "choose another --output")
        where = find_device(device)
        tokenizer = None if built is None else open_tokenizer(path)
        windows = None
        if built is not None and tokenizer is not None and plan.needs_text(checked):
            windows = token_windows(
                checked.calibration,
                tokenizer,
                assets.calibration_text(),
                vocabulary=built.get_input_embeddings().get_parameter("weight").shape[0],
            )
        if not in_memory and not (folder / MANIFEST).exists():
            check_disk(folder, predict(checked, plan, headers).disk)
        identity = {
            "recipe": checked.identity(),
            "model": None
            if in_memory
            else source.digest(lambda share: progress.phase("hashing the source", share)),
            "data": windows.digest if windows else None,
            "code": _version(),
            "device": where.type,
        }
    return Run(
        recipe=checked,
        plan=plan,
        source=source,
        skeleton=built,
        tokenizer=tokenizer,
        windows=windows,
        device=where,
        output=folder,
        identity=identity,
        request=request,
        clock=clock,
        progress=progress,
    )


def _refuse_misplaced(recipe: Recipe, in_memory: bool) -> None:
    """RecipeError for a recipe of files that is used in memory, or the other way round."""
    if not in_memory:
        refuse_in_memory(recipe)
    elif recipe.model_free:
        raise RecipeError("model_free: true has no model to quantize in memory; use quantkit.quantize")


def _recipe(recipe: Recipe | str | Path | Mapping[str, Any], overrides: Sequence[str]) -> tuple[str, Recipe]:
    """(a name for the output folder, the recipe)."""
    if isinstance(recipe, Mapping):
        return "recipe", parse_recipe(recipe, overrides)
    if isinstance(recipe, Recipe):
        return "recipe", parse_recipe(recipe.resolved(), overrides) if overrides else recipe
    return Path(recipe).stem, load_recipe(recipe, overrides)


def _version() -> str:
    from quantkit import __version__

    return __version__


__all__ = ["Result", "quantize"]
