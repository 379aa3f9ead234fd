"""The experts of a block, some at a time: each is read, quantized, put aside and freed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from quantkit.algorithms.config import RtnConfig
from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.expert_run import ExpertRun
from quantkit.calibration.experts import ExpertsStage
from quantkit.calibration.memory import give_back
from quantkit.pipeline.block import BlockResult
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.solve import Steps, run_steps
from quantkit.predict.memory import HELD
from quantkit.recipe.schemes import ExpertsPart

Work = Callable[[BlockRun], Steps[BlockResult]]  # transforms and quantizes a block
PutAside = Callable[[BlockResult], None]  # moves what it became out of memory

FEW = "calibrated on tokens of other experts too, as fewer than min_tokens came to it"
SHORT = "calibrated on fewer than min_tokens tokens, as no others could be added"
NONE = "rounded to nearest instead of {}, as no token of the calibration text came to it"

# Experts that are worked on at once, by type of device (1 elsewhere). One small matrix leaves most of a GPU idle; a CPU
# is busy with it, and a large one keeps a GPU busy too.
AT_ONCE = {"cuda": 32}


def quantize_experts(
    run: BlockRun,
    stage: ExpertsStage,
    options: ExpertsPart,
    work: Work,
    put_aside: PutAside,
    clock: Clock,
    held: int = HELD,
) -> BlockResult:
    """Quantize every expert of one module on the tokens that come to it; their outputs are there for the block then.

    held: bytes that the experts which are worked on at once may take.
    """
    options = options.of(stage.experts.total)
    together = BlockResult()
    if not stage.plans and run.last:
        return together
    with clock("calibrate"):
        run.route(stage, options.top)
        give_back()
    came: list[int] = []
    for batch in _batches(run, stage, options, clock, held):
        planned = [one for one in batch if one.plans]
        results = run_steps(run.ranks, [_steps(one, work, options) for one in planned], clock)
        for result in results:
            put_aside(result)
            together.take(result)
        del planned, results
        while batch:
            one = batch.pop(0)
            came.append(one.own)
            with clock("calibrate"):
                one.advance()
            del one
    with clock("calibrate"):
        stage.finish()
        give_back()
    together.experts.append(_told(f"{run.name}.{stage.name}", came, stage, options))
    return together


def _batches(
    run: BlockRun, stage: ExpertsStage, options: ExpertsPart, clock: Clock, held: int
) -> Iterator[list[ExpertRun]]:
    """All experts, in order, as many at a time as are worked on at once; who takes a batch empties it.

    At least one for each process, which then solves one alone; more where `AT_ONCE` and `held` allow it.
    """
    batch: list[ExpertRun] = []
    processes, most = run.ranks.size, AT_ONCE.get(run.device.type, 1)
    for expert in range(stage.experts.shape.experts):
        if len(batch) >= processes and (len(batch) >= most or _held(batch) > held):
            yield batch
            batch = []
        with clock("load"):
            batch.append(ExpertRun(run, stage, expert, _wanted(stage, expert, options)))
    if batch:
        yield batch


def _held(batch: list[ExpertRun]) -> int:
    """Bytes of some experts that are worked on, and of one more like the last: weights, inputs, and the matrices of the
    widest linear (H, its factor, the drift). The same in all processes.
    """
    sizes = []
    for one in batch:
        weights = sum(parameter.nbytes for parameter in one.module.parameters())
        widest = max((plan.shape[1] for plan in one.plans.values()), default=0)
        inputs, tokens = one.streams.leading, one.own + one.others
        sizes.append(weights + tokens * inputs.shape[-1] * inputs.element_size() + 3 * 4 * widest**2)
    return sum(sizes) + sizes[-1]


def _steps(one: ExpertRun, work: Work, options: ExpertsPart) -> Steps[BlockResult]:
    """One expert, with a note for each of its linears where it saw too little."""
    asked, alone = one.plans, options.calibrate != "all"
    if alone and not one.own:
        one.plans = {n: replace(plan, algorithm=RtnConfig(name="rtn", refit=0)) for n, plan in asked.items()}
    result = yield from work(one)
    for number, layer in enumerate(result.layers):
        plan = next(plan for plan in asked.values() if plan.name == layer.name)
        notes = []
        if alone and not one.own and plan.algorithm.name != "rtn":
            notes = [NONE.format(plan.algorithm.name)]
        elif alone and 0 < one.own < _least(options, plan.shape[1]) and plan.algorithm.needs:
            notes = [FEW if one.others else SHORT]
        details = layer.details | {"tokens": one.own}
        fallbacks = [*(layer.fallbacks or ()), *notes] or None
        result.layers[number] = replace(layer, details=details, fallbacks=fallbacks)
    return result


def _least(options: ExpertsPart, columns: int) -> int:
    """How many tokens are enough for a linear of so many inputs: as many, for a Hessian of full rank."""
    return columns if options.min_tokens is None else options.min_tokens


def _wanted(stage: ExpertsStage, expert: int, options: ExpertsPart) -> int:
    """How many tokens an expert is calibrated on at least."""
    if options.calibrate == "all":
        return 1 << 62
    widest = max((plan.shape[1] for plan in stage.plans.get(expert, {}).values()), default=0)
    return _least(options, widest)


def _told(name: str, came: list[int], stage: ExpertsStage, options: ExpertsPart) -> dict[str, Any]:
    """What the report says of one layer's experts: how many tokens came to each, and what was done about it."""
    counts = torch.tensor(came)
    columns = {plan.shape[1] for plans in stage.plans.values() for plan in plans.values()}
    least = _least(options, max(columns, default=0))
    return {
        "name": name,
        "tokens": came,
        "min": int(counts.min()),
        "median": float(counts.double().median()),
        "below": int((counts < least).sum()),
        "unseen": int((counts == 0).sum()),
        "min_tokens": least,
        "calibrate": options.calibrate,
    }
