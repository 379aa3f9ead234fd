"""Blocks of a finished checkpoint in a run that quantizes only some: they get their stored weights, without solving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.experts import ExpertsStage
from quantkit.checkpoint.compare import read
from quantkit.errors import VerificationError
from quantkit.formats.registry import Codec
from quantkit.models.headers import quantized_linears
from quantkit.models.tensors import read_tensors
from quantkit.numerics.inputs import InputScale
from quantkit.numerics.weight import QuantizedWeight
from quantkit.pipeline.block import BlockResult, linears_of
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.kv import CacheCalibration
from quantkit.pipeline.solve import Steps
from quantkit.plan import LayerPlan
from quantkit.scheme import KVScheme


class StoredLinears:
    """The quantized linears of the checkpoint in `folder`, read one at a time."""

    def __init__(self, folder: Path, codec: Codec) -> None:
        self.folder, self.codec = folder, codec
        self._found = quantized_linears(codec.leaves, read_tensors(folder)[1], codec.joint)

    def of(self, plan: LayerPlan) -> tuple[QuantizedWeight, InputScale | None]:
        """(a planned linear, the stored range of its inputs); VerificationError if the checkpoint has none."""
        if plan.name not in self._found:
            raise VerificationError(f"{self.folder}: {plan.name} is not quantized there, as its recipe says")
        tensors = {leaf: read(info) for leaf, info in self._found[plan.name].items()}
        weight = self.codec.unpack(tensors, plan.scheme)
        inputs = self.codec.inputs_of(tensors) if plan.calibrates_inputs else None
        return weight, inputs


def replayed(
    stored: StoredLinears,
    run: BlockRun,
    clock: Clock,
    kv: KVScheme | None,
    experts: Callable[[ExpertsStage], BlockResult],
    kv_followed: bool,
) -> Steps[BlockResult]:
    """`quantize_block`, with the weights that are stored; it returns nothing to be written.

    What follows sees the same hidden states, bit by bit: codes, scales and ranges of inputs are those of the file, and
    the scales of a KV cache are calibrated again.
    """
    with clock("load"):
        for parts in linears_of(run, run.plans):
            weight, inputs = stored.of(run.plans[parts[0]])
            _take(run, parts, weight.to(run.device), inputs)
    cache = CacheCalibration(run, kv, clock, kv_followed)
    cache.quantized(run.plans)
    for stage in _in_order(run.experts, run.trace.experts):
        experts(stage)
    yield from ()  # nothing is to be solved
    return BlockResult()


def _take(run: BlockRun, parts: list[str], weight: QuantizedWeight, inputs: InputScale | None) -> None:
    """Give modules their rows of a linear on disk."""
    end = 0
    for name in parts:
        held = run.held[name]
        held.quantized = weight.rows(slice(end, end + held.out_features))
        end += held.out_features
        if inputs is not None:
            zero = None if inputs.zero is None else inputs.zero.to(run.device)
            held.input_scale = InputScale(inputs.scale.to(run.device), zero)
        if not run.runs_original:
            held.forget()


def _in_order(stages: Mapping[str, ExpertsStage], place: Mapping[str, int]) -> Iterator[ExpertsStage]:
    """The layers of experts as the block runs them."""
    for name in sorted(stages, key=lambda name: place.get(name, math.inf)):
        yield stages[name]
