"""Shard in, shard out: a block is calibrated, quantized, written, verified and journalled before the next is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch

from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.experts import ExpertsStage
from quantkit.calibration.streams import Streams
from quantkit.calibration.walk import inputs_after_blocks, walk
from quantkit.checkpoint.records import SearchRecord
from quantkit.models.tensors import torch_dtype
from quantkit.numerics.inputs import round_inputs
from quantkit.numerics.statistics import Statistics
from quantkit.pipeline.block import BlockResult, quantize_block
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.experts import quantize_experts
from quantkit.pipeline.inputs import CalibratedInputs, calibrated, statistic
from quantkit.pipeline.model_free import stream_parts
from quantkit.pipeline.pieces import sharing
from quantkit.pipeline.run import Run, needs
from quantkit.pipeline.search import Kept, searched, settled
from quantkit.pipeline.shard_writer import ShardWriter
from quantkit.pipeline.solve import Problem, Steps, run_steps, solve
from quantkit.pipeline.tracker import Tracker
from quantkit.plan import LayerPlan
from quantkit.recipe.schemes import ExpertsPart
from quantkit.scheme import KVScheme
from quantkit.transforms.catalog import transform
from quantkit.transforms.config import TransformConfig

Quantized = Callable[
    [BlockRun, Clock, KVScheme | None, Callable[[ExpertsStage], BlockResult], bool], Steps[BlockResult]
]


class Writer(Protocol):
    """Who keeps what the parts of a model became: a `ShardWriter`, or the model itself (`in_memory.py`)."""

    @property
    def journal(self) -> Kept: ...

    def finished(self) -> int:
        """How many parts are kept already."""

    def streams(self, done: int) -> Streams | None:
        """The hidden states behind `done` parts; None at the beginning."""

    def put_aside(self, part: int, result: BlockResult) -> None:
        """Move an expert out of memory, where that is possible, until its part is kept."""

    def commit(self, part: int, result: BlockResult, streams: Streams | None = None) -> None:
        """Keep one part, and the hidden states behind it."""


def produce(run: Run, writer: Writer) -> tuple[int, Tracker, list[SearchRecord]]:
    """Write all shards; returns how many blocks an earlier run had already finished, what follows the run, and what was
    searched before the first block.
    """
    done, total = writer.finished(), run.plan.n_blocks
    tracker = Tracker(run, done)
    run.progress.start(total, f"{run.source.headers.name} -> {run.output}")
    if done:
        tracker.told(min(done, total) - 1)
    with full_precision():
        found = searched(run, writer.journal, tracker)
        run.clock.block("", begin=True)
        if done <= total:
            if run.skeleton is None:
                assert isinstance(writer, ShardWriter)
                stream_parts(run, writer, tracker, done)
            elif run.needs_streams(done):
                _calibrated(run, writer, tracker, done, settled(run, found))
            else:
                _data_free(run, writer, tracker, done)
    return min(done, total), tracker, found


def _data_free(run: Run, writer: Writer, tracker: Tracker, done: int) -> None:
    """Without calibration: one linear after the other, or those that share a scale; never a whole block."""
    for part in range(done, run.plan.n_blocks + 1):
        result = without_text(run, part)
        tracker.computed(result.weights)
        writer.commit(part, result)
        tracker.finished(part)


def without_text(run: Run, part: int) -> BlockResult:
    """What one part becomes where nothing is calibrated."""
    result = BlockResult()
    for plans in sharing(run, part):
        _quantize_alone(run, part, plans, Statistics(), result)
    return result


def _calibrated(
    run: Run, writer: Writer, tracker: Tracker, done: int, transforms: list[TransformConfig]
) -> None:
    """With calibration: block by block, each behind the quantized ones before it."""
    assert run.windows is not None
    total = run.plan.n_blocks
    streams = writer.streams(done)
    blocks = walk(
        run.model,
        run.source,
        run.plan,
        run.windows.ids,
        run.wanted,
        device=run.device,
        start=done,
        streams=streams,
        timed=run.clock,
        now=run.clock.now,
        ranks=run.ranks,
        thrift=run.thrift,
    )
    for block in blocks:
        block.kept = run.kept
        tracker.opened(block)
        result = worked_on(run, block, transforms, writer.put_aside)
        tracker.computed(result.weights, block)
        with run.clock("calibrate"):
            block.leave()  # now, as packing needs the memory
        streams = block.streams
        writer.commit(block.index, result, streams)
        tracker.finished(block.index)
    if done <= total:
        assert streams is not None
        writer.commit(total, outside(run, streams))
        tracker.finished(total)


def worked_on(
    run: Run,
    block: BlockRun,
    transforms: list[TransformConfig],
    put_aside: Callable[[int, BlockResult], None],
    quantized: Quantized = quantize_block,
) -> BlockResult:
    """Transform and quantize one block, and its experts some at a time.

    put_aside: see `Writer`. quantized: what is done with a transformed block or expert.
    """

    def work(one: BlockRun) -> Steps[BlockResult]:
        scaling = []
        reached = run.ranks.totals(one.streams.leading.numel())[0]  # by tokens, in any process
        for config in transforms if reached else ():
            with run.clock("transform"):
                report = transform(config.name).apply(one, config)
                scaling += [{"transform": config.name} | entry for entry in report]
        kv = run.plan.kv if one is block else None
        result = yield from quantized(one, run.clock, kv, experts, run.plan.kv_followed)
        result.changed |= {f"{one.name}.{n}": t for n, t in one.changed.items()}
        result.scaling = scaling + result.scaling
        return result

    def experts(stage: ExpertsStage) -> BlockResult:
        options = run.recipe.experts or ExpertsPart()
        keep = partial(put_aside, block.index)
        return quantize_experts(block, stage, options, work, keep, run.clock, run.ways.held)

    (result,) = run_steps(run.ranks, [work(block)], run.clock)
    return result


def outside(run: Run, streams: Streams) -> BlockResult:
    """Linears outside the blocks that a rule names (an untied head)."""
    result, part = BlockResult(), run.plan.n_blocks
    for plan in run.plans(part):
        inputs = None
        if plan.calibrates_inputs:
            found = _after_blocks(run, streams, plan, frozenset({statistic(plan)})).range
            assert found is not None
            inputs = calibrated(plan, found, torch_dtype(run.parts[part][f"{plan.name}.weight"].dtype))
        statistics = _after_blocks(run, streams, plan, needs(plan), inputs) if needs(plan) else Statistics()
        _quantize_alone(run, part, [plan], statistics, result, inputs)
    return result


def _after_blocks(
    run: Run,
    streams: Streams,
    plan: LayerPlan,
    fields: frozenset[str],
    inputs: CalibratedInputs | None = None,
) -> Statistics:
    """Statistics of the input of one linear outside the blocks, rounded as its scheme says once a range is known."""
    assert run.windows is not None
    grid = plan.scheme.inputs

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if grid is None or (inputs is None and not grid.dynamic):
            return x
        return round_inputs(x, grid, None if inputs is None else inputs.scale)

    with run.clock("calibrate"):
        return inputs_after_blocks(
            run.model,
            run.source,
            run.plan,
            run.windows.ids,
            streams,
            plan.module,
            fields,
            run.device,
            rounded,
            run.ranks,
        )


def _quantize_alone(
    run: Run,
    part: int,
    plans: Sequence[LayerPlan],
    statistics: Statistics,
    result: BlockResult,
    inputs: CalibratedInputs | None = None,
) -> None:
    """Read and quantize a linear that is not held in a block, or several alike as one matrix.

    inputs: the range of static ones.
    """
    first, parts = plans[0], []
    with run.clock("load"):
        for plan in plans:
            weight = run.source.tensor(f"{plan.name}.weight")
            weight = (weight.T.contiguous() if plan.transposed else weight).float()
            parts.append(weight.to(run.device) if run.windows is not None else weight)
    with run.clock("quantize"):
        dtype = torch_dtype(run.parts[part][f"{first.name}.weight"].dtype)
        problem = Problem(parts, statistics, first.scheme.weights, dtype, first.algorithm)
        outcome = solve(run.ranks, problem)
        end = 0
        for plan, own in zip(plans, parts, strict=True):
            end += len(own)
            rows = outcome if len(plans) == 1 else outcome.rows(slice(end - len(own), end))
            result.add(plan, own, rows, inputs)


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no autograd while statistics are accumulated; the user's settings come back."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
