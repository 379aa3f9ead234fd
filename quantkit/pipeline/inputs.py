"""Static scales of linears' inputs: what their range was on the calibration text, and what is stored of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quantkit.calibration.block_run import BlockRun
from quantkit.errors import NumericalError
from quantkit.numerics.input_range import InputRange, choose, clipped
from quantkit.numerics.inputs import InputScale
from quantkit.plan import LayerPlan


@dataclass(frozen=True)
class CalibratedInputs:
    """scale: as it is stored. details: the range it was chosen from, for the report."""

    scale: InputScale
    details: dict[str, Any]


def statistic(plan: LayerPlan) -> str:
    """The field of `Statistics` that the choice of a layer's range needs."""
    return "range" if plan.input_range == "minmax" else "counts"


def calibrated(plan: LayerPlan, found: InputRange, dtype: torch.dtype) -> CalibratedInputs:
    """The scale of a layer with static inputs. dtype: of the stored scale. NumericalError if the text gives none."""
    grid = plan.scheme.inputs
    assert grid is not None
    if not found.finite:
        raise NumericalError(f"{plan.name}: the inputs are NaN or infinite on the calibration text")
    if float(found.low) == 0 == float(found.high):
        raise NumericalError(
            f"{plan.name}: the inputs are 0 on all of the calibration text, which gives no scale; use other text, or "
            "inputs with dynamic scales"
        )
    scale = choose(found, grid, plan.input_range, dtype)
    value = float(scale.scale)
    if not (torch.isfinite(scale.scale).all() and value > 0):
        raise NumericalError(
            f"{plan.name}: inputs from {float(found.low):.3g} to {float(found.high):.3g} give the scale {value:g} in "
            f"{dtype}; use inputs with dynamic scales, or a transform"
        )
    details: dict[str, Any] = {"input_low": float(found.low), "input_high": float(found.high)}
    details["input_scale"] = value
    if found.counts is not None:
        details["inputs_clipped"] = clipped(found, scale, grid)
    return CalibratedInputs(scale, details)


def no_range(name: str) -> str:
    """That a linear with static inputs never ran, and what to do."""
    return (
        f"{name} never ran on the calibration text, so its inputs have no range; use more text, inputs with dynamic "
        "scales, or skip it with a rule"
    )


def calibrate_inputs(run: BlockRun, sets: list[tuple[str, ...]]) -> dict[str, CalibratedInputs]:
    """The input scales of the linears of `sets` that need one, by name inside the block.

    One pass, behind everything that is quantized already. Siblings share their range, hence their scale.
    """
    wanted = [s for s in sets if any(n in run.plans and run.plans[n].calibrates_inputs for n in s)]
    found: dict[str, CalibratedInputs] = {}
    if not wanted:
        return found
    plans = {n: plan for n, plan in run.plans.items() if plan.calibrates_inputs}
    fields = {statistic(plans[n]) for s in wanted for n in s if n in plans}
    ranges = run.ranges(wanted, "counts" if "counts" in fields else "range")
    if unseen := [plans[name].name for s in wanted if s not in ranges for name in s if name in plans]:
        raise NumericalError(no_range(unseen[0]))
    for siblings, range_ in ranges.items():
        for name in plans.keys() & set(siblings):
            found[name] = calibrated(plans[name], range_, run.stored[f"{name}.weight"])
            run.held[name].input_scale = found[name].scale
    return found
