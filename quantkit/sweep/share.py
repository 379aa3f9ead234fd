"""Which cells of a sweep need no quantization of their own, because another one gives the same weights. Without torch.

Cells that differ in the KV cache alone have the same weights, unless later layers are calibrated behind the rounded
cache. Then the weights are quantized once, in the cell that also calibrates the scales of its cache, and the others run
them with another cache. Nothing in a result changes by it: the tests compare the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.errors import RecipeError, UserError
from quantkit.models.headers import Headers
from quantkit.plan import Plan, build_plan
from quantkit.predict.sizes import stored_bytes
from quantkit.sweep.grid import Cell
from quantkit.validation import check_target


@dataclass(frozen=True)
class Planned:
    """A cell on the model. source: the id of the cell whose quantization gives its weights, perhaps its own.

    n_bytes: of all tensors of its checkpoint.
    """

    cell: Cell
    plan: Plan
    source: str
    n_bytes: int

    @property
    def shares(self) -> bool:
        """Whether its weights are another cell's."""
        return self.source != self.cell.id


def plan_cells(cells: Sequence[Cell], headers: Headers, share: bool = True) -> list[Planned]:
    """Every cell planned on the model; RecipeError with all that does not fit. share: False, each for itself."""
    plans: dict[str, Plan] = {}
    problems: list[str] = []
    for cell in cells:
        try:
            if cell.recipe.searched:
                raise RecipeError(
                    f"{' and '.join(cell.recipe.searched)}: a target of size and a gate cannot be swept; sweep the "
                    "recipe that a search has written"
                )
            plans[cell.id] = build_plan(cell.recipe, headers)
            check_target(cell.recipe, plans[cell.id], headers)
        except UserError as error:
            problems += [f"cell {cell.id}: {line}" for line in str(error).splitlines()]
    if problems:
        raise RecipeError("\n".join(problems))
    sources = _sources(cells, plans) if share else {cell.id: cell.id for cell in cells}
    return [
        Planned(cell, plan := plans[cell.id], sources[cell.id], sum(stored_bytes(plan, headers).values()))
        for cell in cells
    ]


def in_order(planned: Sequence[Planned]) -> list[Planned]:
    """The cells as they are worked on: each that shares weights right behind the one that makes them."""
    found: list[Planned] = []
    for each in planned:
        if not each.shares:
            found += [each, *(other for other in planned if other.shares and other.source == each.cell.id)]
    return found


def _sources(cells: Sequence[Cell], plans: Mapping[str, Plan]) -> dict[str, str]:
    """Cell -> the cell that quantizes its weights."""
    groups: dict[str, list[str]] = {}
    sources = {}
    for cell in cells:
        sources[cell.id] = cell.id
        if cell.recipe.weights is not None and _weights_alone(plans[cell.id]):
            rest = {key: value for key, value in cell.recipe.resolved().items() if key != "kv_cache"}
            groups.setdefault(json.dumps(rest, sort_keys=True), []).append(cell.id)
    for group in groups.values():
        makers = [each for each in group if plans[each].calibrates_cache] or group[:1]
        for each in group:
            if each not in makers:
                sources[each] = makers[0]
    return sources


def _weights_alone(plan: Plan) -> bool:
    """Whether the quantized weights are those of the same recipe with an exact cache."""
    kv = plan.kv
    if kv is None:
        return True
    weighs = any(layer.algorithm.needs for layer in plan.layers) and not plan.on_original
    if plan.calibrates_cache and weighs and not plan.weights_follow:
        return False  # it is weighed behind quantized layers, as calibrating the cache brings them along
    return not plan.kv_followed or bool(kv.residual) or not plan.weights_follow
