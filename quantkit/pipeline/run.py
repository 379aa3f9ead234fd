"""`quantize`: one call from recipe to a checkpoint that is written, verified and evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from quantkit import assets
from quantkit.calibration.text import token_windows
from quantkit.checkpoint.journal import Journal, discard, refuse_other
from quantkit.checkpoint.shards import write_json
from quantkit.checkpoint.verify import MANIFEST, read_manifest, verify_checkpoint
from quantkit.device import find_device
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint, resolve_model
from quantkit.models.source import Source
from quantkit.models.tokenizer import open_tokenizer
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.evaluation import EvaluationRequest, evaluate_pair
from quantkit.pipeline.memory import large_blocks_apart
from quantkit.pipeline.produce import Producer
from quantkit.pipeline.publish import publish, report_of
from quantkit.plan import build_plan
from quantkit.recipe import Recipe, load_recipe, parse_recipe


@dataclass(frozen=True)
class Result:
    """What a run gave. output: the checkpoint folder. report: see docs/checkpoint.md ("quantkit-run/1")."""

    output: Path
    report: dict[str, Any]
    manifest: dict[str, Any]


class Silent:
    """The progress protocol, without a display."""

    def start(self, total_blocks: int, title: str) -> None: ...

    def block(self, index: int, name: str, note: str = "") -> None: ...

    def message(self, text: str) -> None: ...

    def finish(self) -> None: ...


def quantize(
    recipe: Recipe | str | Path | Mapping[str, Any],
    model: str | Path | None = None,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    resume: bool = True,
    evaluate: bool = True,
    progress: Any = None,
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
    progress: an object with start/block/message/finish.

    Raises the errors of `quantkit.errors`; nothing half-written is left that looks finished.
    """
    progress = progress or Silent()
    clock = Clock()
    large_blocks_apart()
    with clock("load"):
        name, checked = _recipe(recipe, overrides)
        embedded = assets.default_model()
        path = resolve_model(str(model) if model is not None else checked.model, embedded)
        length = checked.calibration.sequence_length
        request = EvaluationRequest.of(eval_tokens, eval_text, length) if evaluate else None
        headers = read_checkpoint(path)
        plan = build_plan(checked, headers)
        folder = Path(output) if output is not None else Path("out") / f"{path.resolve().name}-{name}"
        where = find_device(device)
        source = Source(headers)
        skeleton_model = skeleton.build(source)
        transformers_logging.disable_progress_bar()
        tokenizer = open_tokenizer(path)
        windows = None
        if Producer.needs_calibration(checked, plan):
            windows = token_windows(
                checked.calibration,
                tokenizer,
                assets.calibration_text(),
                vocabulary=skeleton_model.get_input_embeddings().num_embeddings,
            )
        identity = {
            "recipe": checked.identity(),
            "model": source.digest(),
            "data": windows.digest if windows else None,
            "code": _version(),
            "device": where.type,
        }
    if resume and (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        refuse_other(folder, manifest["identity"], identity)
        verify_checkpoint(folder, manifest["files"], manifest["tensors"])
        discard(folder)
        progress.message(f"{folder} is finished; its files were verified again")
        if request and not request.answered_by(manifest["evaluation"]):
            manifest["evaluation"], _ = evaluate_pair(folder, headers, tokenizer, where, length, request)
            write_json(folder / MANIFEST, manifest)
        return Result(folder, report_of(folder, manifest), manifest)
    journal = Journal(folder, identity, resume)
    try:
        producer = Producer(checked, plan, source, skeleton_model, windows, where, journal, clock, progress)
        resumed = producer.run()
        manifest, report = publish(producer, tokenizer, identity, request=request, resumed=resumed)
        journal.remove()
    finally:
        journal.close()
    return Result(folder, report, manifest)


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
