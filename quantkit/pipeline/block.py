"""One block: statistics in, quantized weights out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from quantkit.algorithms.catalog import algorithm
from quantkit.algorithms.registry import Outcome
from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.memory import give_back
from quantkit.errors import NumericalError
from quantkit.numerics.statistics import Statistics
from quantkit.numerics.weight import QuantizedWeight
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.inputs import needs
from quantkit.plan import LayerPlan


@dataclass
class BlockResult:
    """What one block became. Keys are full module or parameter names.

    weights: the quantized linears. changed: other parameters a transform has changed, in their stored dtype.
    layers: one report per quantized linear. scaling: one per scaling group a transform has looked at.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)
    scaling: list[dict] = field(default_factory=list)

    def add(self, plan: LayerPlan, weight: torch.Tensor, outcome: Outcome) -> None:
        """Record one linear; NumericalError if it is not usable. weight: what was to be quantized, fp32 [N, K]."""
        error = check_sound(plan.name, weight, outcome)
        self.weights[plan.name] = outcome.weight
        self.layers.append(
            {
                "name": plan.name,
                "scheme": str(plan.scheme),
                "algorithm": plan.algorithm.name,
                "weight_error": error,
            }
            | outcome.details
            | ({"fallbacks": outcome.fallbacks} if outcome.fallbacks else {})
        )


def check_sound(name: str, weight: torch.Tensor, outcome: Outcome) -> float:
    """Relative squared weight error; NumericalError naming the layer if it is non-finite or collapsed.

    Collapsed: all zero, or the objective the algorithm minimised is no better than with all zeros. (The plain weight
    error may exceed 1 in directions the inputs never take.)
    """
    quantized = outcome.weight
    if not bool(torch.isfinite(quantized.scale).all()):
        raise NumericalError(
            f"{name}: non-finite scales; look for extreme weights or calibration inputs in this layer"
        )
    if not bool(weight.any()):
        return 0.0
    error = quantized.relative_error(weight)
    objective = float(outcome.details.get("relative_error", error))
    if not objective < 1.0:
        raise NumericalError(
            f"{name}: collapsed: the quantized weight is no better than zero (relative error {objective:.3g}); "
            "use more bits or a smaller group for this layer, or skip it with a rule"
        )
    return error


def quantize_block(run: BlockRun, clock: Clock) -> BlockResult:
    """Quantize the planned linears of one block, one set of siblings (linears that share an input) after the other.

    The block keeps the quantized weights, so the statistics of each set see the sets before it already quantized
    ("true sequential"), unless every algorithm declines that.
    """
    result, plans = BlockResult(), run.plans
    sets = [s for s in run.trace.siblings if any(n in plans for n in s)]
    missing = plans.keys() - {n for s in sets for n in s}
    if missing:
        raise NumericalError(f"{sorted(missing)} never ran in the block's forward; skip them with a rule")
    run.finished({n for s in run.trace.siblings for n in s} - plans.keys())
    fields = {s: frozenset().union(*(needs(plans[n]) for n in s if n in plans)) for s in sets}
    if any(getattr(p.algorithm, "true_sequential", False) for p in plans.values()):
        passes = [[s] for s in sets]
    else:
        passes = [sets]
    for together in passes:
        with clock("calibrate"):
            statistics = run.collect(together, fields)
            give_back()
        with clock("quantize"):
            for siblings in together:
                _quantize_siblings(run, siblings, statistics.pop(siblings, Statistics()), result)
    return result


def _quantize_siblings(
    run: BlockRun, siblings: tuple[str, ...], statistics: Statistics, result: BlockResult
) -> None:
    """Siblings with one scheme and algorithm are quantized as one matrix: they share the Hessian."""
    held, plans = run.held, run.plans
    alike: dict[tuple, list[str]] = {}
    for name in siblings:
        if name in plans:
            dtype = run.stored[f"{name}.weight"]
            alike.setdefault((plans[name].scheme, plans[name].algorithm, dtype), []).append(name)
    for (scheme, config, dtype), names in alike.items():
        rows = [held[n].out_features for n in names]
        together = torch.empty(sum(rows), held[names[0]].in_features, device=run.device)
        for part, name in zip(together.split(rows), names, strict=True):
            part.copy_(held[name].weight)
        last = names[-1] == list(alike.values())[-1][-1]  # an algorithm may use its statistics up
        mine = statistics if last else replace(statistics)
        outcome = algorithm(config.name).quantize(together, mine, scheme.weights, dtype, config)
        weights = together.split(rows)
        q = outcome.weight
        zeros = [None] * len(names) if q.zero is None else q.zero.split(rows)
        for name, weight, codes, scale, zero in zip(
            names, weights, q.codes.split(rows), q.scale.split(rows), zeros, strict=True
        ):
            part = QuantizedWeight(codes, scale, zero, scheme.weights)
            held[name].quantized = part
            result.add(plans[name], weight, replace(outcome, weight=part))
            if run.streams.full is None:
                held[name].forget()
    run.finished(siblings)
    give_back()
