"""Statistics of the original model's inputs, collected in one walk for all recipes that can use them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from quantkit.calibration.kept_statistics import FIELDS, KeptStatistics, StatisticsWriter, open_statistics
from quantkit.calibration.walk import Wanted, walk
from quantkit.errors import DataError
from quantkit.models import families
from quantkit.pipeline.produce import full_precision
from quantkit.pipeline.run import Run, needs

# What a recipe that needs all of them looks like: every linear planned, nothing rounded in the original stream.
RECIPE = {"weights": {"algorithm": {"name": "gptq", "stream": "original"}, "group_size": "channel"}}


def collect_statistics(run: Run, folder: Path) -> KeptStatistics:
    """Collect all fields for the planned linears of a run, in one walk of the original model, and keep them.

    Memory: one block with its statistics, and the hidden states of all windows.
    """
    assert run.windows is not None
    writer = StatisticsWriter(folder, run.identity["model"], [run.windows.digest])
    wanted = Wanted(full=len(run.windows.ids), quantized=False)
    with full_precision():
        for block in walk(
            run.model,
            run.source,
            run.plan,
            run.windows.ids,
            wanted,
            device=run.device,
            timed=run.clock,
            now=run.clock.now,
            ranks=run.ranks,
        ):
            sets = [s for s in block.trace.siblings if any(name in block.plans for name in s)]
            with run.clock("calibrate"):
                found = block.collect(sets, dict.fromkeys(sets, FIELDS))
            writer.add(
                block.name,
                {tuple(f"{block.name}.{name}" for name in s): each for s, each in found.items()},
            )
    return writer.finish()


def serves(run: Run) -> bool:
    """Whether kept statistics can stand in for what a run would collect, exactly.

    Not for mixtures, whose experts see other tokens in every recipe; not for linears outside the blocks; not where
    inputs are rounded before an algorithm sees them.
    """
    layers = run.plan.layers
    fields = frozenset().union(*(needs(layer) for layer in layers))
    rounded = any(layer.scheme.inputs for layer in layers)
    inside = all(
        layer.block is not None and not families.EXPERT_TENSOR.search(layer.name) for layer in layers
    )
    used = any(getattr(each, "statistics", None) for each in run.recipe.transforms)
    used = used or run.plan.on_original or bool(fields and not run.plan.follows_quantized)
    return run.windows is not None and used and inside and not (fields and rounded)


def with_statistics(run: Run, folder: Path) -> Run:
    """The run with kept statistics, if they can serve it; DataError if they are of another model."""
    kept = open_statistics(folder)
    if kept.model != run.identity["model"]:
        raise DataError(
            f"{folder} holds statistics of another model; leave it out, or collect them on this one"
        )
    if not serves(run) or not kept.covers(name for layer in run.plan.layers for name in layer.modules):
        return run
    identity = run.identity
    if kept.data != (identity["data"],):
        identity = identity | {"statistics": " ".join(kept.data)}
    elif (
        run.plan.on_original and run.recipe.transforms
    ):  # what is folded divides them: the last bits may differ
        identity = identity | {"statistics": "kept"}
    return replace(run, kept=kept, identity=identity)
