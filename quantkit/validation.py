"""Everything that can be known about a run before it: every mistake at once, the plan, and what it will need.

Only the recipe, `config.json`, the headers of the weights and the names of the texts are read; torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from quantkit.allocation.explicit import explicit_recipe
from quantkit.allocation.groups import Allocatable, find_groups
from quantkit.allocation.targets import allocate, rooms
from quantkit.calibration.documents import check_source
from quantkit.errors import RecipeError, UserError
from quantkit.formats.compressed_tensors_config import written_config
from quantkit.formats.registry import MEMORY
from quantkit.models.companions import find_companions
from quantkit.models.headers import Headers, read_checkpoint, resolve_model
from quantkit.plan import Plan, build_plan
from quantkit.predict.budget import settled
from quantkit.predict.memory import USUAL, Ways
from quantkit.predict.sizes import Prediction
from quantkit.preflight.check import outlook, preflight, verdicts
from quantkit.preflight.subject import Linear, Subject
from quantkit.recipe.recipe import Recipe, load_recipe, refuse_in_memory
from quantkit.scheme import Grid, Scheme

T = TypeVar("T")


@dataclass(frozen=True)
class Validated:
    """A recipe without mistakes; with a model also what happens to each linear, and what the run will need.

    engines: (whether it runs, one line) of those that could serve the result, if the recipe names no target; outlook:
    what to say of the target, if it names one. ways: how the run saves memory. search: what is said of a search of
    bits; plan and prediction are then those of an allocation of the asked size, all layers equally sensitive.
    """

    recipe: Recipe
    plan: Plan | None = None
    prediction: Prediction | None = None
    engines: tuple[tuple[bool, str], ...] = ()
    outlook: str = ""
    headers: Headers | None = None
    ways: Ways = USUAL
    search: str = ""


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


def _is_model_free(recipe: Recipe | None) -> bool:
    return recipe is not None and recipe.model_free


def validate(
    recipe: str | Path, model: str | None = None, overrides: Sequence[str] = (), engines: bool = True
) -> Validated:
    """Check a recipe (a file or a shipped name) and, with a model, that it fits; UserError with every mistake.

    engines: also ask every engine where the recipe names no target, which takes long for thousands of experts.
    """
    mistakes = _Mistakes()
    checked = mistakes.collect(load_recipe, recipe, overrides)
    if checked is not None:
        mistakes.collect(refuse_in_memory, checked)
        for source in checked.calibration.data:
            mistakes.collect(check_source, source)
    headers = plan = needed = None
    if model is not None:
        headers = mistakes.collect(
            lambda: read_checkpoint(resolve_model(model, Path(model)), _is_model_free(checked))
        )
    if headers is not None:
        mistakes.collect(find_companions, headers.path)
    if checked is not None and headers is not None:
        plan = mistakes.collect(build_plan, checked, headers)
    if checked is not None and headers is not None and plan is not None:
        mistakes.collect(check_target, checked, plan, headers)
    shown, said = plan, ""
    if checked is not None and headers is not None and plan is not None and checked.searched:
        expected = mistakes.collect(expected_search, checked, plan, headers)
        if expected is not None:
            explicit, said = expected
            shown = build_plan(explicit, headers)
    if checked is not None and headers is not None and shown is not None:
        needed = mistakes.collect(settled, checked, shown, headers)
    mistakes.raise_all()
    assert checked is not None
    if shown is None or headers is None or needed is None:
        return Validated(checked)
    ways, prediction = needed
    found = Validated(checked, shown, prediction, headers=headers, ways=ways, search=said)
    asked = None if checked.target is None else checked.target.asked
    if asked is not None:
        return replace(found, outlook=outlook(subject_of(shown, headers), asked))
    return replace(found, engines=tuple(verdicts(subject_of(shown, headers)))) if engines else found


def check_target(recipe: Recipe, plan: Plan, headers: Headers) -> None:
    """RecipeError with all that the recipe's target would refuse; nothing without a target, or without files."""
    asked = None if recipe.target is None else recipe.target.asked
    if asked is None or recipe.output.format == MEMORY:
        return
    found = preflight(subject_of(plan, headers), asked)
    if found:
        raise RecipeError("\n".join(f"target: {asked}: {each}" for each in found))


def subject_of(plan: Plan, headers: Headers, written: Mapping[str, Any] | None = None) -> Subject:
    """The checkpoint that a plan will write, as the rules about engines look at it.

    written: its `quantization_config`, once there is one.
    """
    schemes = {layer.name: layer.scheme for layer in plan.layers}
    linears = [Linear(one.name, one.shape, one.scheme, transposed=one.transposed) for one in plan.layers]
    left = {
        name: headers.tensors[f"{name}.weight"].shape
        for name, _ in plan.skipped
        if f"{name}.weight" in headers.tensors
    }
    linears += [Linear(name, (shape[0], shape[1]), None) for name, shape in left.items() if len(shape) == 2]
    kv = plan.kv if plan.calibrates_cache else None
    if written is None:
        written = written_config(schemes, sorted(left), kv) if schemes or kv else {}
    return Subject(linears, headers.config, written, plan.kv, list(headers.tensors))


def search_space(recipe: Recipe, plan: Plan, headers: Headers) -> Allocatable:
    """What a search can give bits to, with schemes that the target's engine runs; RecipeError if there is none."""
    found = find_groups(recipe, plan, headers)
    asked = None if recipe.target is None else recipe.target.asked
    if asked is None:
        return found
    first = [group for group in found.groups if group.block == found.groups[0].block]
    grids = list(dict.fromkeys(scheme.weights for group in found.groups for scheme in group.schemes))

    def refuses(given: Sequence[Grid]) -> bool:
        """Whether the engine refuses the groups of the first block, with these grids in turn."""
        chosen = [given[number % len(given)] for number in range(len(first))]
        layers = tuple(
            replace(layer, scheme=Scheme(grid, layer.scheme.inputs))
            for group, grid in zip(first, chosen, strict=True)
            for layer in group.layers
            if grid.divides(layer.shape[1])
        )
        return bool(layers) and bool(preflight(subject_of(replace(plan, layers=layers), headers), asked))

    refused = [grid for grid in grids if refuses([grid])]
    left = [grid for grid in grids if grid not in refused]
    if len(left) > 1 and refuses(
        left
    ):  # transformers decodes mixed schemes by the first, unless all are symmetric
        refused += [grid for grid in left if not grid.symmetric]
    return find_groups(recipe, plan, headers, refused) if refused else found


def expected_search(recipe: Recipe, plan: Plan, headers: Headers) -> tuple[Recipe, str]:
    """(a recipe without search, of the size that is asked for, what can be said of the search); RecipeError if the size
    cannot be met.

    As if a weight of b bits did damage in proportion to 4^-b in every layer.
    """
    found = search_space(recipe, plan, headers)
    small, large = (found.bits_per_weight(found.extreme(largest)) for largest in (False, True))
    schemes = {str(scheme) for group in found.groups for scheme in group.schemes}
    said = f"{len(found.groups)} groups of linears, {len(schemes)} schemes, {small:.3f} to {large:.3f} bits per weight"
    if recipe.target is None or recipe.target.goal is None:
        return explicit_recipe(
            recipe, plan, found, found.now
        ), f"gate: begins with the recipe as it is; {said}"
    room = rooms(recipe, plan, headers, found)[0]
    damages = [
        [group.weights * 4.0 ** (-8 * size / group.weights) for size in group.sizes] for group in found.groups
    ]
    chosen = allocate(found, damages, room.capacity)
    also = f"; {room.beside}" if room.beside else ""
    said = f"target.{recipe.target.goal}: {said}{also}; which layer gets which is measured by the run"
    return explicit_recipe(recipe, plan, found, chosen, room.cache), said
