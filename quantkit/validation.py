"""Everything that can be known about a run before it: every mistake at once, the plan, and what it will need.

Only the recipe, `config.json`, the headers of the weights and the names of the texts are read; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quantkit.calibration.documents import check_source
from quantkit.errors import RecipeError, UserError
from quantkit.models.companions import find_companions
from quantkit.models.headers import read_checkpoint, resolve_model
from quantkit.plan import Plan, build_plan
from quantkit.predict import Prediction, predict
from quantkit.recipe import Recipe, load_recipe, refuse_in_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Validated:
    """A recipe without mistakes; with a model also what happens to each linear, and what the run will need."""

    recipe: Recipe
    plan: Plan | None = None
    prediction: Prediction | None = None


class _Mistakes:
    """Collects errors of the user's input, so that one does not hide the next."""

    def __init__(self) -> None:
        self.found: list[UserError] = []

    def collect(self, step: Callable[..., T], *arguments: Any) -> T | None:
        """The result of a step, None if it failed."""
        try:
            return step(*arguments)
        except UserError as error:
            self.found.append(error)
            return None

    def raise_all(self) -> None:
        """The one error as it is, or several as one RecipeError, a line each."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise RecipeError("\n".join(dict.fromkeys(map(str, self.found))))


def validate(recipe: str | Path, model: str | None = None, overrides: Sequence[str] = ()) -> Validated:
    """Check a recipe (a file or a shipped name) and, with a model, that it fits; UserError with every mistake."""
    mistakes = _Mistakes()
    checked = mistakes.collect(load_recipe, recipe, overrides)
    if checked is not None:
        mistakes.collect(refuse_in_memory, checked)
        for source in checked.calibration.data:
            mistakes.collect(check_source, source)
    headers = plan = None
    if model is not None:
        headers = mistakes.collect(lambda: read_checkpoint(resolve_model(model, Path(model))))
    if headers is not None:
        mistakes.collect(find_companions, headers.path)
    if checked is not None and headers is not None:
        plan = mistakes.collect(build_plan, checked, headers)
    mistakes.raise_all()
    assert checked is not None
    if plan is None or headers is None:
        return Validated(checked)
    return Validated(checked, plan, predict(checked, plan, headers))
