"""Linears that must agree on a scheme, the schemes that each such group may have, and the bytes that each would take.

Engines fuse siblings (q, k and v; gate and up) into one linear and all experts of a layer into one kernel, so these are
one group each. A rule of the recipe that says how a linear is stored is obeyed: what it covers is no group. Nor is what
lies outside the decoder blocks. Everything comes from the plan and the checkpoint's headers; torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from quantkit.errors import RecipeError
from quantkit.formats.registry import unstorable
from quantkit.models import families
from quantkit.models.headers import Headers
from quantkit.plan import LayerPlan, Plan, starred
from quantkit.predict.sizes import packed_bytes, stored_bytes, stored_itemsize
from quantkit.recipe.recipe import Recipe
from quantkit.recipe.schemes import WEIGHT_KEYS
from quantkit.scheme import Grid, Scheme, integer

# (bits, group size) of the usual choices. Fewer columns per scale are what bits between two whole ones are bought with.
USUAL = (
    (2, 128),
    (2, 64),
    (2, 32),
    (3, 128),
    (3, 64),
    (3, 32),
    (4, 128),
    (4, 32),
    (5, 128),
    (6, 128),
    (8, 128),
)
SMALLEST = 32  # columns that share a scale in the usual choices
COARSE = 3  # bits from which down a zero point is worth its place whatever the recipe says


@dataclass(frozen=True)
class Group:
    """Linears with one scheme. name: that of the first, or of the module that holds the experts. block: its number.

    experts: whether they are the experts of a layer. schemes: what they may have; sizes: the bytes that they take with
    each. now: the number of the scheme that the recipe itself gives them.
    """

    name: str
    block: int
    layers: tuple[LayerPlan, ...]
    experts: bool
    schemes: tuple[Scheme, ...]
    sizes: tuple[int, ...]
    now: int

    @property
    def weights(self) -> int:
        return sum(math.prod(layer.shape) for layer in self.layers)


@dataclass(frozen=True)
class Allocatable:
    """All that bits can be given to. fixed: bytes of the other tensors of the output; of these, `pinned` bytes are
    other quantized linears, with `pinned_weights` weights.
    """

    groups: tuple[Group, ...]
    fixed: int
    pinned: int
    pinned_weights: int

    @property
    def weights(self) -> int:
        """Of all quantized linears."""
        return self.pinned_weights + sum(group.weights for group in self.groups)

    def bits_per_weight(self, chosen: Sequence[int]) -> float:
        """Of all quantized linears, counted from stored bytes. chosen: the number of each group's scheme."""
        return 8 * (self.pinned + self.bytes_of(chosen)) / self.weights

    def bytes_of(self, chosen: Sequence[int]) -> int:
        """What the groups take."""
        return sum(group.sizes[number] for group, number in zip(self.groups, chosen, strict=True))

    @property
    def now(self) -> list[int]:
        """What the recipe itself gives the groups."""
        return [group.now for group in self.groups]

    def extreme(self, largest: bool) -> list[int]:
        """The smallest, or the largest, scheme of every group."""
        pick = max if largest else min
        return [pick(range(len(group.sizes)), key=lambda n: group.sizes[n]) for group in self.groups]


def find_groups(recipe: Recipe, plan: Plan, headers: Headers, refused: Iterable[Grid] = ()) -> Allocatable:
    """The groups of a planned model. refused: grids that the target's engine would not run.

    RecipeError if the recipe's rules leave no linear to choose for, or a group has no scheme.
    """
    pinned = [layer for layer in plan.layers if layer.block is None or _is_pinned(recipe, layer.name)]
    names = {layer.name for layer in pinned}
    members: dict[tuple[str, bool], list[LayerPlan]] = {}
    for layer in plan.layers:
        if layer.name not in names:
            members.setdefault(_together(layer.name), []).append(layer)
    if not members:
        raise RecipeError(
            f"{' and '.join(recipe.searched)}: the rules say how every linear is stored, so nothing is left to choose; "
            "remove `bits` and `group_size` from a rule"
        )
    bytes_now = stored_bytes(plan, headers)
    groups = [
        _group(recipe, headers, name, experts, layers, frozenset(refused))
        for (name, experts), layers in members.items()
    ]
    free = sum(bytes_now[f"{layer.name}.weight"] for layers in members.values() for layer in layers)
    return Allocatable(
        groups=tuple(groups),
        fixed=sum(bytes_now.values()) - free,
        pinned=sum(bytes_now[f"{layer.name}.weight"] for layer in pinned),
        pinned_weights=sum(math.prod(layer.shape) for layer in pinned),
    )


def _is_pinned(recipe: Recipe, name: str) -> bool:
    """Whether the rule that counts for a linear says how it is stored."""
    rule = next((rule for rule in reversed(recipe.rules) if rule.fits(name)), None)
    return rule is not None and bool(rule.model_fields_set & {*WEIGHT_KEYS, "preset"})


def _together(name: str) -> tuple[str, bool]:
    """(what the linears that share a scheme have in common, whether they are experts)."""
    if expert := families.EXPERT_TENSOR.search(name):
        end = expert.end() if expert[2] == "experts" else expert.start()
        return name[:end].rstrip("."), True
    parent, _, leaf = name.rpartition(".")
    siblings = next((sorted(members) for members in families.SIBLINGS if leaf in members), [leaf])
    return f"{parent}.{'|'.join(siblings)}", False


def _grids(recipe: Recipe, columns: int) -> list[Grid]:
    """What to choose from for linears of so many columns; without a target of size the recipe's own is among it.

    A usual group size that does not divide a row is halved until it does.
    """
    assert recipe.weights is not None
    own = recipe.weights.scheme.weights
    if recipe.target is not None and recipe.target.choices is not None:
        return list(dict.fromkeys(choice.scheme.weights for choice in recipe.target.choices))
    symmetric = own.symmetric if own.number.kind == "int" else True
    found = [] if recipe.target is not None and recipe.target.goal is not None else [own]
    for bits, size in USUAL:
        every = [size >> halvings for halvings in range(3) if size >> halvings >= SMALLEST]
        fitting = next((each for each in every if columns % each == 0), size)
        found.append(integer(bits, fitting, symmetric and bits > COARSE))
    return list(dict.fromkeys(found))


def _group(
    recipe: Recipe,
    headers: Headers,
    name: str,
    experts: bool,
    layers: Sequence[LayerPlan],
    refused: frozenset[Grid],
) -> Group:
    first = layers[0]
    assert first.block is not None
    label = name if experts else first.name
    narrowest = min(layer.shape[1] for layer in layers)
    grids = [grid for grid in _grids(recipe, narrowest) if grid not in refused]
    schemes = [Scheme(grid, first.scheme.inputs) for grid in grids]
    schemes = [
        scheme
        for scheme in schemes
        if all(scheme.weights.divides(layer.shape[1]) for layer in layers)
        and (unstorable(recipe.output.format, scheme) is None or scheme == first.scheme)
    ]
    if not schemes:
        wide = ", ".join(sorted({str(layer.shape[1]) for layer in layers}))
        raise RecipeError(
            f"{' and '.join(recipe.searched)}: no scheme to choose from suits {starred(label)} (in_features {wide}, "
            f"format {recipe.output.format}); give target.choices, or skip it with a rule"
        )
    sizes = [sum(_bytes(headers, layer, scheme) for layer in layers) for scheme in schemes]
    own = schemes.index(first.scheme) if first.scheme in schemes else _closest(sizes, headers, layers)
    return Group(label, first.block, tuple(layers), experts, tuple(schemes), tuple(sizes), own)


def _closest(sizes: Sequence[int], headers: Headers, layers: Sequence[LayerPlan]) -> int:
    """The scheme whose bytes are closest to those of the recipe's own, which is none of the choices."""
    asked = sum(_bytes(headers, layer, layer.scheme) for layer in layers)
    return min(range(len(sizes)), key=lambda number: abs(sizes[number] - asked))


def _bytes(headers: Headers, layer: LayerPlan, scheme: Scheme) -> int:
    return packed_bytes(
        replace(layer, scheme=scheme), stored_itemsize(headers.tensors[f"{layer.name}.weight"])
    )
