"""A recipe's budget against what a run needs: how the run must work, or why it cannot; without torch."""

from __future__ import annotations

from quantkit.errors import RecipeError
from quantkit.models.headers import Headers
from quantkit.plan import Plan
from quantkit.predict.memory import LEAST, USUAL, Memory, Ways, least_ways, memory_of
from quantkit.predict.sizes import Prediction, predict
from quantkit.recipe.recipe import Recipe
from quantkit.recipe.sizes import size_text


def settled(recipe: Recipe, plan: Plan, headers: Headers, device: str = "cpu") -> tuple[Ways, Prediction]:
    """How a run works within its recipe's budget, and what it will need then.

    RecipeError, with the least that is possible, if the budget is too small. device: the type that blocks run on.
    """
    budget = recipe.budget
    if budget is None:
        return USUAL, predict(recipe, plan, headers)
    problems: list[str] = []
    # what branches off while sensitivities are measured is in no prediction of memory, so it lies on disk
    measures = bool(recipe.searched) and budget.ram is not None
    found = [Ways(spilled=True) if measures else USUAL]
    for key, limit, cuda in (("ram", budget.ram, False), ("vram", budget.vram, True)):
        if limit is None or (cuda and device != "cuda"):
            continue
        ways = least_ways(recipe, plan, headers, limit, cuda)
        if ways is None:
            least = memory_of(recipe, plan, headers, LEAST, cuda)
            problems.append(_too_little(key, limit, least))
        else:
            found.append(ways)
    ways = Ways(
        spilled=any(each.spilled for each in found),
        kept=min((each.kept for each in found if each.kept is not None), default=None),
        held=min(each.held for each in found),
    )
    prediction = predict(recipe, plan, headers, ways)
    if budget.disk is not None and prediction.disk > budget.disk:
        made = "the checkpoint" if recipe.gate is None else "two checkpoints at once"
        also = ", and hidden states that do not fit in memory" if ways.spilled else ""
        problems.append(
            f"budget.disk: {size_text(budget.disk)} is too little: {made}, and what a resumed run needs{also}, take "
            f"{size_text(prediction.disk)}; allow that, or use fewer bits or fewer calibration samples"
        )
    if problems:
        raise RecipeError("\n".join(problems))
    return ways, prediction


def _too_little(key: str, limit: int, least: Memory) -> str:
    return (
        f"budget.{key}: {size_text(limit)} is too little: with hidden states on disk and nothing kept, "
        f"{least.moment or 'the process'} still takes {size_text(least.peak)}; allow that, or use a smaller "
        "calibration.sequence_length or an algorithm without a Hessian"
    )
