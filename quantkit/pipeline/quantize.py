"""`quantize`: one call from recipe to a checkpoint that is written, verified and evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit import assets
from quantkit.calibration.distributed import joined
from quantkit.calibration.memory import large_blocks_apart
from quantkit.calibration.ranking import refuse_weighted
from quantkit.calibration.ranks import ALONE, Ranks
from quantkit.calibration.text import Windows, token_windows
from quantkit.checkpoint.journal import Journal, discard, refuse_other
from quantkit.checkpoint.manifest import MANIFEST, RECIPE, read_manifest, write_manifest
from quantkit.checkpoint.records import Manifest
from quantkit.checkpoint.stream_files import StreamFiles
from quantkit.checkpoint.verify import verify_checkpoint
from quantkit.device import find_device, launch
from quantkit.errors import OutputError, RecipeError, UserError, memory_named, why
from quantkit.formats.registry import MEMORY
from quantkit.models import skeleton
from quantkit.models.borders import quiet
from quantkit.models.headers import Headers, read_checkpoint, resolve_model
from quantkit.models.source import Source
from quantkit.models.tokenizer import open_tokenizer
from quantkit.paths import weights_path
from quantkit.pipeline.agreed import agreed
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.disk import check_disk
from quantkit.pipeline.evaluation import EvaluationRequest, evaluate_pair
from quantkit.pipeline.kept_streams import Follower
from quantkit.pipeline.model_free import evaluable
from quantkit.pipeline.produce import produce
from quantkit.pipeline.progress import Progress, Silent
from quantkit.pipeline.publish import files_of, publish, write_run_facts
from quantkit.pipeline.report import RunReport
from quantkit.pipeline.run import Run, beyond
from quantkit.pipeline.shard_writer import ShardWriter
from quantkit.pipeline.statistics import with_statistics
from quantkit.pipeline.tracker import EVALUATE, VERIFY, Tracker
from quantkit.plan import Plan, build_plan
from quantkit.predict.budget import settled
from quantkit.recipe.recipe import Recipe, load_recipe, parse_recipe, refuse_in_memory
from quantkit.validation import check_target, expected_search

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INTERRUPTED = "what is finished is kept, and the same command with as many processes goes on after it"


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
    statistics: str | Path | None = None,
) -> Result:
    """Quantize a causal LM by a recipe and verify what was written.

    recipe: a shipped recipe's name, a YAML file, a mapping, or a `Recipe`. model: folder or hub id; default the
    recipe's, else the embedded model. output: default ./out/<model>-<recipe>. overrides: `key=value` as --set takes.
    device: auto | cpu | cuda[:n], where blocks are calibrated. resume: continue an interrupted run of the same
    inputs (a finished one is verified and its stored result returned). evaluate: also measure original and quantized
    model. eval_text: on these files, dataset folders or `hf:` names; default the embedded evaluation text.
    eval_tokens: on exactly so many tokens; default at most 65,536, fewer once the KL is known to 2 %.
    progress: who is told how far the run is (`quantkit.pipeline.progress`). statistics: a folder of kept statistics of
    this model (`pipeline.statistics`), used instead of collecting what they hold; of other text than the recipe's, they
    become part of what the result is recorded to be made of.

    Raises the errors of `quantkit.errors`; nothing half-written is left that looks finished. The weights are published
    before they are evaluated: an evaluation that fails is a note in the report and `Result.failed`, and the next call
    with the same inputs only evaluates.

    In the processes of torchrun (docs/processes.md) all make the same call: they share the work, the first one writes
    and reports, and all return the same. ProcessLost in the others if one of them fails.
    """
    asked = (eval_tokens, eval_text) if evaluate else None
    if _recipe(recipe, overrides)[1].searched:
        # here: it quantizes with this very function
        from quantkit.pipeline.searched import Call, quantize_searched

        if statistics is not None:
            raise UserError(
                "kept statistics serve no search of bits, which measures its own; leave out statistics, or use it with "
                f"the recipe that a search has written, {RECIPE}"
            )
        call = Call(model, device, evaluate, progress, eval_tokens, eval_text)
        return quantize_searched(recipe, call, output, overrides, resume)
    with joined(device, INTERRUPTED) as ranks:
        shown = progress if progress is not None and not ranks.rank else Silent()
        run = prepared(recipe, model, output, overrides, device, asked, shown, ranks=ranks)
        run = run if statistics is None else with_statistics(run, Path(statistics))
        manifest: Manifest | None = ranks.first(_finished(run) if resume and not ranks.rank else None)
        resumed = tracker = None
        if manifest is None:
            manifest, resumed, tracker = _made(run, resume, ranks)
        notes: list[str] = []
        failed = None
        if run.request and not run.request.answered_by(manifest.evaluation):
            try:
                manifest, notes = _evaluate(run, run.request, manifest, resumed, tracker, ranks)
            except Exception as error:  # whatever it is, the weights are finished
                if ranks.rank:
                    raise  # the first process hears of it
                failed = f"the evaluation failed: {why(error)}; the weights in {run.output} are finished, and the same "
                failed += "command evaluates them again"
                notes = [failed]
                ranks.failed(failed)
        run.progress.finish()
        if failed or not ranks.rank:
            report = RunReport.of(run.output, manifest)
            result = Result(run.output, replace(report, notes=[*report.notes, *notes]), manifest, failed)
        return result if failed else ranks.sent(None if ranks.rank else result)


def _finished(run: Run) -> Manifest | None:
    """The manifest of a checkpoint that an earlier run has finished, verified; None if there is none."""
    folder = run.output
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    refuse_other(folder, manifest.identity, run.identity)
    verify_checkpoint(folder, manifest.files, manifest.tensors)
    discard(folder)
    run.progress.message(f"{folder} is finished; its files were verified again")
    return manifest


def _made(run: Run, resume: bool, ranks: Ranks) -> tuple[Manifest, int | None, Tracker | None]:
    """Make the checkpoint: (its manifest, how many blocks an earlier run had done, what follows the run).

    ranks: all processes. Without calibration text, the first one works alone.
    """
    if ranks.rank:
        follower = Follower(run) if run.ranks.size > 1 else None
        resumed, tracker = produce(run, follower)[:2] if follower else (None, None)
        manifest: Manifest = ranks.sent(None)
        if follower:
            follower.leave()
        return manifest, resumed, tracker
    streams = StreamFiles(run.output, 0) if run.ranks.size > 1 else None
    if ranks.size > 1:
        work = (
            f"work together, {torch.get_num_threads()} threads each" if streams else "have one to do the work"
        )
        run.progress.message(f"{ranks.size} processes {work}")
    journal = Journal(run.output, run.identity, resume, files_of(run), streams)
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
    return ranks.first(manifest), resumed, tracker


def _evaluate(
    run: Run,
    request: EvaluationRequest,
    manifest: Manifest,
    resumed: int | None,
    tracker: Tracker | None,
    ranks: Ranks,
) -> tuple[Manifest, list[str]]:
    """Measure a published checkpoint and add the result to its manifest: (the new one, why not if it cannot be).

    resumed: None if the checkpoint was finished by an earlier run, whose facts stay. ranks: they share the windows if
    all of them see the checkpoint; otherwise the first one measures alone.
    """
    if reason := beyond(run):
        return manifest, [reason]
    if not all(ranks.gather((run.output / MANIFEST).exists())):
        if ranks.rank:
            return manifest, []
        ranks = ALONE
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
            ranks=ranks,
        )
    tracker.phase(EVALUATE, 1.0, run.clock.now() - begin)
    if evaluation is not None and not ranks.rank:
        if resumed is not None:
            write_run_facts(run, manifest, resumed, evaluated=True)
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
    ranks: Ranks = ALONE,
) -> Run:
    """Read and check everything a run needs, before anything is computed or written.

    asked: tokens and text of the closing evaluation, None to leave it out. in_memory: no file is going to be written.
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
        built = _skeleton(checked, source)
        plan, expected = _planned(checked, headers, built)
        named = Path("out") / f"{Path(headers.name).name}-{name}"
        folder = weights_path(named if output is None else output, OutputError, "choose another --output")
        where = find_device(device)
        tokenizer = None if built is None else open_tokenizer(path)
        windows = None
        if built is not None and tokenizer is not None and (plan.needs_text(checked) or checked.searched):
            windows = _windows(checked, built, tokenizer)
        ways, needed = settled(checked, expected, headers, where.type)
        if not in_memory and not ranks.rank and not (folder / MANIFEST).exists():
            check_disk(folder, needed.disk)
        reads = not in_memory and (
            ranks.size == 1 or not launch().local
        )  # files of a machine: by one process
        identity = {
            "recipe": checked.identity(),
            "model": source.digest(partial(progress.phase, "hashing the source")) if reads else None,
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
        identity=agreed(ranks, identity, 0 if windows is None else len(windows.ids)),
        request=request,
        clock=clock,
        progress=progress,
        ranks=ranks if windows is not None else ALONE,
        ways=ways,
        needed=needed,
    )


def _windows(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """The calibration text."""
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    return token_windows(recipe.calibration, tokenizer, assets.calibration_text(), vocabulary=vocabulary)


def _planned(recipe: Recipe, headers: Headers, built: PreTrainedModel | None) -> tuple[Plan, Plan]:
    """(the plan of a run, which the recipe's target would take, that of what it will make); the same without a search.

    What a search will make is of the size that is asked for.
    """
    places = None if built is None else skeleton.places(built)
    plan = build_plan(recipe, headers, places)
    check_target(recipe, plan, headers)
    if not recipe.searched:
        return plan, plan
    return plan, build_plan(expected_search(recipe, plan, headers)[0], headers, places)


def _skeleton(recipe: Recipe, source: Source) -> PreTrainedModel | None:
    """The model without weights, None if there need not be one; ModelError if it cannot rank experts as asked."""
    if recipe.model_free:
        return None
    built = skeleton.build(source)
    if recipe.experts is not None and recipe.experts.top is not None:
        refuse_weighted(built, recipe.experts.top)
    return built


def _refuse_misplaced(recipe: Recipe, in_memory: bool) -> None:
    """RecipeError for a recipe of files that is used in memory, or the other way round."""
    if not in_memory:
        refuse_in_memory(recipe)
    elif recipe.budget is not None:
        raise RecipeError("budget bounds a run that writes files; leave it out to quantize in memory")
    elif recipe.searched:
        raise RecipeError(
            f"{' and '.join(recipe.searched)} is searched for by quantkit.quantize, which writes the recipe that was "
            f"found into {RECIPE}; give that one"
        )
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
