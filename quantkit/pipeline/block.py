"""One block: statistics in, quantized weights out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from quantkit.algorithms.catalog import algorithm
from quantkit.algorithms.config import RtnConfig
from quantkit.algorithms.registry import Outcome
from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.experts import ExpertsStage
from quantkit.calibration.memory import give_back
from quantkit.checkpoint.records import LayerRecord
from quantkit.errors import ModelError, NumericalError
from quantkit.models.tensors import TensorInfo
from quantkit.numerics.inputs import InputScale
from quantkit.numerics.statistics import Statistics
from quantkit.numerics.weight import QuantizedWeight
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.inputs import CalibratedInputs, calibrate_inputs, no_range
from quantkit.pipeline.kv import CacheCalibration
from quantkit.pipeline.run import needs
from quantkit.pipeline.solve import Problem, Steps, joined
from quantkit.plan import LayerPlan
from quantkit.scheme import KVScheme


@dataclass
class BlockResult:
    """What one block became.

    weights: the quantized linears; inputs: the stored ranges of those with static inputs; both by the name on disk.
    changed: other parameters a transform has changed, in their stored dtype, by the model's names of them.
    layers: one record per quantized linear. scaling: one per scaling group a transform has looked at. cache: calibrated
    scales of the KV cache, as they are stored, by the model's names of them. experts: one report per layer of experts.
    aside: linears that lie packed in a file already, by name: their tensors there.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    inputs: dict[str, InputScale] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    scaling: list[dict[str, Any]] = field(default_factory=list)
    cache: dict[str, torch.Tensor] = field(default_factory=dict)
    experts: list[dict[str, Any]] = field(default_factory=list)
    aside: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)

    def take(self, other: BlockResult) -> None:
        """Take in what a part of the block (an expert) became."""
        self.layers += other.layers
        self.scaling += other.scaling
        self.experts += other.experts
        self.weights |= other.weights
        self.inputs |= other.inputs
        self.changed |= other.changed
        self.aside |= other.aside

    def add(
        self, plan: LayerPlan, weight: torch.Tensor, outcome: Outcome, inputs: CalibratedInputs | None = None
    ) -> None:
        """Record one linear; NumericalError if it is not usable. weight: what was to be quantized, fp32 [N, K].

        inputs: the range of static ones.
        """
        sound = check_sound(plan.name, weight, outcome)
        fallbacks = outcome.fallbacks + sound.notes
        details: dict[str, Any] = outcome.details | {
            name: int(count.sum()) for name, count in outcome.counts.items()
        }
        self.weights[plan.name] = outcome.weight
        if inputs is not None:
            self.inputs[plan.name] = inputs.scale
            details |= inputs.details
        self.layers.append(
            LayerRecord(
                name=plan.name,
                scheme=str(plan.scheme),
                algorithm=plan.algorithm.name,
                weight_error=sound.weight_error,
                relative_error=sound.objective,
                worst_row_error=sound.worst_row,
                details=details,
                fallbacks=fallbacks or None,
            )
        )


NOTED_WEIGHT_ERROR = (
    10.0  # of the weight alone: directions the inputs never take may cost more than zero does
)
REFUSED_WEIGHT_ERROR = 1000.0


class Soundness(NamedTuple):
    """How far a quantized linear is from the original: squared error over squared norm, 0 for a weight of zeros.

    weight_error: of the weight. objective: of what the algorithm minimised. worst_row: the largest objective of a row.
    """

    weight_error: float
    objective: float
    worst_row: float
    notes: list[str]


def check_sound(name: str, weight: torch.Tensor, outcome: Outcome) -> Soundness:
    """The errors of one linear; NumericalError naming it if it is non-finite or collapsed.

    Collapsed: all zero, or the objective the algorithm minimised is no better than with all zeros, or the weight is
    out of all proportion. Single rows that are no better than zero are a note.
    """
    quantized = outcome.weight
    if not bool(torch.isfinite(quantized.scales()).all()):
        raise NumericalError(
            f"{name}: non-finite scales; look for extreme weights or calibration inputs in this layer"
        )
    if not bool(weight.any()):
        return Soundness(0.0, 0.0, 0.0, [])
    weight_error = quantized.relative_error(weight)
    if outcome.error is None or outcome.norm is None:
        error, norm = quantized.row_errors(weight)
        objective = weight_error
    else:
        error, norm = outcome.error, outcome.norm
        total = float(norm.sum())
        objective = float(error.sum()) / total if total > 0 else weight_error
    return judged(name, quantized.is_zero, weight_error, objective, error, norm)


def judged(
    name: str, zero: bool, weight_error: float, objective: float, error: torch.Tensor, norm: torch.Tensor
) -> Soundness:
    """The errors of one linear with what is to be noted about them; NumericalError if they say that it has collapsed.

    zero: whether all of the quantized weight is. error, norm: objective of every row [N], and that of a row of zeros.
    """
    if not bool(norm.any()):
        return Soundness(0.0, 0.0, 0.0, [])
    if zero or not objective < 1.0 or not weight_error < REFUSED_WEIGHT_ERROR:
        raise NumericalError(
            f"{name}: collapsed: the quantized weight is {'zero' if zero else 'no better than zero'} "
            f"(relative error of the objective {objective:.3g}, of the weight {weight_error:.3g}); use more bits, a "
            "smaller group, more calibration or more damping for this layer, or skip it with a rule"
        )
    rows = torch.where(norm > 0, error / norm, torch.zeros_like(norm))
    notes = []
    if lost := int((rows >= 1).sum()):
        notes.append(f"{lost} of {len(rows)} rows are no better than zero; use more bits or a smaller group")
    if weight_error > NOTED_WEIGHT_ERROR:
        notes.append(
            f"the weight is far from the original (relative error {weight_error:.3g}): the calibration says too little "
            "about it; use more calibration or more damping"
        )
    return Soundness(weight_error, objective, float(rows.max()), notes)


def quantize_block(
    run: BlockRun,
    clock: Clock,
    kv: KVScheme | None = None,
    experts: Callable[[ExpertsStage], BlockResult] | None = None,
    kv_followed: bool = True,
) -> Steps[BlockResult]:
    """Quantize the planned linears of one block, one set of siblings (linears that share an input) after the other.

    A generator of what is to be solved, see `run_steps`; it returns what the block became.

    The block keeps the quantized weights, so the statistics of each set see the sets before it already quantized
    ("true sequential"), unless every algorithm declines that. kv: how the block's KV cache is quantized; kv_followed:
    see `CacheCalibration`. experts: quantizes the experts of the block, when their turn comes.
    """
    result, plans = BlockResult(), run.plans
    sets = [s for s in run.trace.siblings if any(n in plans for n in s)]
    _round_unused(run, sorted(plans.keys() - {n for s in sets for n in s}), result)
    run.finished({n for s in run.trace.siblings for n in s} - plans.keys())
    fields = {s: frozenset().union(*(needs(plans[n]) for n in s if n in plans)) for s in sets}
    cache = CacheCalibration(run, kv, clock, kv_followed)
    for together in _passes(run, sets):
        if isinstance(together, ExpertsStage):
            assert experts is not None
            result.take(experts(together))
            continue
        with clock("calibrate"):
            inputs = calibrate_inputs(run, together)
            statistics = run.collect(together, fields)
            give_back()
        for siblings in together:
            given = statistics.pop(siblings, Statistics())
            if fields[siblings] and not given.tokens:  # the router of experts has sent nothing there
                with clock("quantize"):
                    _round_unused(run, [name for name in siblings if name in plans], result)
                    run.finished(siblings)
                continue
            yield from _quantize_siblings(run, siblings, given, inputs, result, clock)
        cache.quantized(name for siblings in together for name in siblings)
    result.cache = cache.stored()
    return result


def _passes(run: BlockRun, sets: list[tuple[str, ...]]) -> list[list[tuple[str, ...]] | ExpertsStage]:
    """What is worked on at once: sets of siblings between two stages of experts, or each alone; in order of running."""
    alone = any(getattr(p.algorithm, "true_sequential", False) for p in run.plans.values())
    place: dict[Any, tuple[float, int]] = {s: (number, 1) for number, s in enumerate(run.trace.siblings)}
    place |= {name: (run.trace.experts.get(name, math.inf), 0) for name in run.experts}
    found: list[list[tuple[str, ...]] | ExpertsStage] = []
    waiting: list[tuple[str, ...] | str] = [*sets, *run.experts]
    for each in sorted(waiting, key=lambda one: place[one]):
        last = found[-1] if found else None
        if isinstance(each, str):
            found.append(run.experts[each])
        elif alone or not isinstance(last, list):
            found.append([each])
        else:
            last.append(each)
    return found


def _round_unused(run: BlockRun, names: list[str], result: BlockResult) -> None:
    """Round linears to nearest that no text reaches, such as the cross-attention of a decoder without its encoder."""
    for parts in linears_of(run, names):
        plan = run.plans[parts[0]]
        weight = joined([run.held[name].weight.data for name in parts])
        if plan.calibrates_inputs:
            raise NumericalError(no_range(plan.name))
        nearest = replace(plan, algorithm=RtnConfig(name="rtn", refit=0))
        dtype = run.stored[f"{parts[0]}.weight"]
        outcome = algorithm("rtn").quantize(
            weight, Statistics(), plan.scheme.weights, dtype, nearest.algorithm
        )
        _share_out(run, parts, outcome, 0)
        result.add(nearest, weight, replace(outcome, fallbacks=[*outcome.fallbacks, *_unused(plan)]))


def linears_of(run: BlockRun, names: Iterable[str]) -> list[list[str]]:
    """Planned modules by the linear on disk they are: each alone, or several in the order of their rows there."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(run.plans[name].name, []).append(name)
    for linear, parts in found.items():
        order = run.plans[parts[0]].split
        if order and sorted(order) != sorted(f"{run.name}.{part}" for part in parts):
            raise ModelError(
                f"{linear} is {len(order)} linears in the model, which do not read the same input; skip it with a rule"
            )
        parts.sort(key=lambda part: order.index(f"{run.name}.{part}") if order else 0)
    return list(found.values())


def _share_out(run: BlockRun, parts: Sequence[str], outcome: Outcome, first: int) -> slice:
    """Give modules their rows of what was quantized, from `first` on; all of these rows."""
    end = first
    for name in parts:
        size = run.held[name].out_features
        run.held[name].quantized = outcome.rows(slice(end, end + size)).weight
        end += size
    return slice(first, end)


def _unused(plan: LayerPlan) -> list[str]:
    asked = plan.algorithm.name
    return (
        []
        if asked == "rtn"
        else [f"rounded to nearest instead of {asked}: it never ran on the calibration text"]
    )


def _quantize_siblings(
    run: BlockRun,
    siblings: tuple[str, ...],
    statistics: Statistics,
    inputs: Mapping[str, CalibratedInputs],
    result: BlockResult,
    clock: Clock,
) -> Steps[None]:
    """Siblings with one scheme and algorithm are quantized as one matrix: they share the Hessian.

    So they also share what a weight has once (the scale of a tensor, NVFP4's global scale), as engines that fuse them
    need it. A linear whose last block of rows is not a whole one is quantized for itself. inputs: static ones, by name
    inside the block.
    """
    held, plans = run.held, run.plans
    alike: dict[tuple[Any, ...], list[str]] = {}
    for parts in linears_of(run, [name for name in siblings if name in plans]):
        plan, dtype = plans[parts[0]], run.stored[f"{parts[0]}.weight"]
        alone = plan.name if plan.shape[0] % plan.scheme.weights.rows(1) else None
        alike.setdefault((plan.scheme, plan.algorithm, dtype, alone), []).extend(parts)
    for (scheme, config, dtype, _), names in alike.items():
        last = names[-1] == list(alike.values())[-1][-1]  # an algorithm may use its statistics up
        given = statistics if last else replace(statistics)
        weights = [held[name].weight.data for name in names]
        outcome = yield Problem(weights, given, scheme.weights, dtype, config)
        with clock("quantize"):
            _take(run, names, outcome, inputs, result)
    with clock("quantize"):
        run.finished(siblings)
        give_back()


def _take(
    run: BlockRun,
    names: list[str],
    outcome: Outcome,
    inputs: Mapping[str, CalibratedInputs],
    result: BlockResult,
) -> None:
    """Give linears that were quantized as one matrix their parts of it, and record them."""
    held, end = run.held, 0
    for parts in linears_of(run, names):
        weight = joined([held[name].weight.data for name in parts])
        mine = _share_out(run, parts, outcome, end)
        result.add(run.plans[parts[0]], weight, outcome.rows(mine), inputs.get(parts[0]))
        end = mine.stop
    if not run.runs_original:
        for name in names:
            held[name].forget()
