"""`Run`: everything that one quantization needs, as one frozen value that the steps pass on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from quantkit_eval.protocols import Tokenizer

from quantkit.algorithms.catalog import algorithm
from quantkit.calibration.kept_statistics import KeptStatistics
from quantkit.calibration.ranks import ALONE, Ranks
from quantkit.calibration.spill import Spill, Thrift
from quantkit.calibration.text import Windows
from quantkit.calibration.walk import Wanted
from quantkit.checkpoint.stream_files import FOLDER
from quantkit.models.source import Source
from quantkit.models.tensors import TensorInfo
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.evaluation import EvaluationRequest
from quantkit.pipeline.progress import Progress
from quantkit.plan import LayerPlan, Plan
from quantkit.predict.memory import USUAL, Ways
from quantkit.predict.sizes import Prediction
from quantkit.recipe.recipe import Recipe
from quantkit.transforms.catalog import transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Run:
    """The inputs of one run and where it reports to.

    skeleton: the model on meta, checked against the checkpoint. It and the tokenizer are None where a checkpoint is
    quantized by names alone. windows: None if no layer needs text. identity: what decides the result; two runs with
    equal ones write equal files. request: the closing evaluation, if any. clock, progress: where time goes, and who is
    told. ranks: the processes that share the run, each with a `Run` of its own. ways: how it saves memory.
    needed: what it was predicted to need, that way. kept: statistics of the original model that need not be collected.
    """

    recipe: Recipe
    plan: Plan
    source: Source
    skeleton: PreTrainedModel | None
    tokenizer: Tokenizer | None
    windows: Windows | None
    device: torch.device
    output: Path
    identity: dict[str, Any]
    request: EvaluationRequest | None
    clock: Clock
    progress: Progress
    ranks: Ranks = ALONE
    ways: Ways = USUAL
    needed: Prediction | None = None
    kept: KeptStatistics | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The skeleton, of a run that has one."""
        assert self.skeleton is not None
        return self.skeleton

    @cached_property
    def thrift(self) -> Thrift:
        """How calibration saves memory; what it spills lies beside the journal."""
        spill = Spill(self.output / FOLDER) if self.ways.spilled else None
        return Thrift(spill, self.ways.kept)

    @cached_property
    def parts(self) -> list[dict[str, TensorInfo]]:
        """The source tensors of every shard, by their names on disk: the blocks in order, then the rest."""
        parts: list[dict[str, TensorInfo]] = [{} for _ in range(self.plan.n_blocks + 1)]
        for disk, info in self.source.headers.tensors.items():
            if disk not in self.source.dropped:
                parts[self.plan.parts.get(disk, -1)][disk] = info
        return parts

    def plans(self, part: int) -> list[LayerPlan]:
        """The planned linears of one shard: a block's, or those outside the blocks."""
        block = part if part < self.plan.n_blocks else None
        return [layer for layer in self.plan.layers if layer.block == block]

    def needs_streams(self, done: int) -> bool:
        """Whether hidden states are needed to go on after `done` shards."""
        total = self.plan.n_blocks
        return self.windows is not None and done <= total and (done < total or bool(self.plans(total)))

    @property
    def wanted(self) -> Wanted:
        """Which hidden states the walk has to carry.

        full: what transforms look at, what re-targeting aims at (half the windows, see docs/LOG.md), and what
        data-aware rounding weighs by. quantized: see `Plan.follows_quantized`.
        """
        every = len(self.windows.ids) if self.windows else 0
        fields = frozenset().union(*(needs(layer) for layer in self.plan.layers))
        quantized = self.plan.follows_quantized
        served = self.kept is not None and "drift" not in fields  # a drift is of all that the full stream has
        looked = (t for t in self.recipe.transforms if not (served and getattr(t, "statistics", None)))
        full = max((transform(t.name).windows(t) for t in looked), default=0)
        if "drift" in fields:
            full = max(full, -(-every // 2))
        if fields and (not quantized or self.plan.on_original) and not served:
            full = every
        if served:
            full = max(full, 1)  # for the proofs of what is folded
        return Wanted(full, quantized, behind_last=bool(self.plans(self.plan.n_blocks)))


def needs(layer: LayerPlan) -> frozenset[str]:
    """The statistics that a layer's algorithm asks for; none for a data-free one."""
    return algorithm(layer.algorithm.name).needs(layer.algorithm)


def beyond(run: Run) -> str | None:
    """Why the budget leaves no room for the closing evaluation; None if it does."""
    budget, needed = run.recipe.budget, run.needed
    if budget is None or needed is None:
        return None
    key, limit = ("vram", budget.vram) if run.device.type == "cuda" else ("ram", budget.ram)
    if limit is None or needed.evaluation <= limit:
        return None
    return (
        f"not evaluated: with the original and the quantized model in memory it takes about "
        f"{needed.evaluation / 2**30:.2f} GiB, more than budget.{key} allows; run `quantkit eval` where it fits"
    )
