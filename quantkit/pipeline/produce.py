"""Shard in, shard out: a block is calibrated, quantized, written, verified and journalled before the next is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quantkit.algorithms.catalog import algorithm
from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.streams import Streams
from quantkit.calibration.walk import inputs_after_blocks, walk
from quantkit.checkpoint.records import SearchRecord
from quantkit.models.tensors import torch_dtype
from quantkit.numerics.inputs import round_inputs
from quantkit.numerics.statistics import Statistics
from quantkit.pipeline.block import BlockResult, quantize_block
from quantkit.pipeline.inputs import CalibratedInputs, calibrated, statistic
from quantkit.pipeline.run import Run, needs
from quantkit.pipeline.search import searched, settled
from quantkit.pipeline.shard_writer import ShardWriter
from quantkit.pipeline.tracker import Tracker
from quantkit.plan import LayerPlan
from quantkit.transforms.catalog import transform
from quantkit.transforms.config import TransformConfig


def produce(run: Run, writer: ShardWriter) -> tuple[int, Tracker, list[SearchRecord]]:
    """Write all shards; returns how many blocks an earlier run had already finished, what follows the run, and what was
    searched before the first block.
    """
    done, total = writer.finished(), run.plan.n_blocks
    tracker = Tracker(run, done)
    run.progress.start(total, f"{run.source.headers.name} -> {run.output}")
    if done:
        tracker.told(min(done, total) - 1)
    with _full_precision():
        found = searched(run, writer.journal, tracker)
        if done <= total:
            if run.needs_streams(done):
                _calibrated(run, writer, tracker, done, settled(run, found))
            else:
                _data_free(run, writer, tracker, done)
    return min(done, total), tracker, found


def _data_free(run: Run, writer: ShardWriter, tracker: Tracker, done: int) -> None:
    """Without calibration: one linear after the other, never a whole block."""
    for part in range(done, run.plan.n_blocks + 1):
        result = BlockResult()
        for plan in run.plans(part):
            _quantize_alone(run, part, plan, Statistics(), result)
        tracker.computed(result.weights)
        writer.commit(part, result)
        tracker.finished(part)


def _calibrated(
    run: Run, writer: ShardWriter, tracker: Tracker, done: int, transforms: list[TransformConfig]
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
    )
    for block in blocks:
        tracker.opened(block)
        result = _worked_on(run, block, transforms)
        tracker.computed(result.weights, block)
        with run.clock("calibrate"):
            block.leave()  # now, as packing needs the memory
        streams = block.streams
        writer.commit(block.index, result, streams)
        tracker.finished(block.index)
    if done <= total:
        assert streams is not None
        writer.commit(total, _outside(run, streams))
        tracker.finished(total)


def _worked_on(run: Run, block: BlockRun, transforms: list[TransformConfig]) -> BlockResult:
    """Transform and quantize one block."""
    scaling = []
    for config in transforms:
        with run.clock("transform"):
            report = transform(config.name).apply(block, config)
            scaling += [{"transform": config.name} | entry for entry in report]
    result = quantize_block(block, run.clock, run.plan.kv)
    result.changed = {f"{block.name}.{n}": t for n, t in block.changed.items()}
    result.scaling = scaling
    return result


def _outside(run: Run, streams: Streams) -> BlockResult:
    """Linears outside the blocks that a rule names (an untied head)."""
    result, part = BlockResult(), run.plan.n_blocks
    for plan in run.plans(part):
        inputs = None
        if plan.calibrates_inputs:
            found = _after_blocks(run, streams, plan, frozenset({statistic(plan)})).range
            assert found is not None
            inputs = calibrated(plan, found, torch_dtype(run.parts[part][f"{plan.name}.weight"].dtype))
        statistics = _after_blocks(run, streams, plan, needs(plan), inputs) if needs(plan) else Statistics()
        _quantize_alone(run, part, plan, statistics, result, inputs)
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
            run.model, run.source, run.plan, run.windows.ids, streams, plan.name, fields, run.device, rounded
        )


def _quantize_alone(
    run: Run,
    part: int,
    plan: LayerPlan,
    statistics: Statistics,
    result: BlockResult,
    inputs: CalibratedInputs | None = None,
) -> None:
    """Read and quantize one linear that is not held in a block. inputs: the range of static ones."""
    with run.clock("load"):
        weight = run.source.tensor(f"{plan.name}.weight")
        weight = (weight.T.contiguous() if plan.transposed else weight).float()
        if run.windows is not None:
            weight = weight.to(run.device)
    with run.clock("quantize"):
        dtype = torch_dtype(run.parts[part][f"{plan.name}.weight"].dtype)
        outcome = algorithm(plan.algorithm.name).quantize(
            weight, statistics, plan.scheme.weights, dtype, plan.algorithm
        )
        result.add(plan, weight, outcome, inputs)


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 and no autograd while statistics are accumulated; the user's settings come back."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
