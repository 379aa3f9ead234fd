"""How many bytes the chosen schemes may take: what a target of size leaves for them; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantkit.allocation.groups import Allocatable
from quantkit.allocation.knapsack import Item, best_choices
from quantkit.cost.attention import find_attention
from quantkit.cost.model import find_model
from quantkit.errors import RecipeError
from quantkit.formats.registry import unstorable_cache
from quantkit.models.blocks import hidden_size, text_config
from quantkit.models.headers import Headers
from quantkit.plan import Plan
from quantkit.recipe.recipe import Recipe
from quantkit.recipe.sizes import size_text
from quantkit.scheme import KV_PRESETS, KVScheme

CACHES = ("none", "FP8", "INT8")  # to choose from, unless the recipe says or has a cache
CHUNK = 2048  # tokens of prompts that an engine computes at once
FLOAT, HALF = 4, 2  # bytes
_HIDDEN_BUFFERS, _WIDE_BUFFERS = (
    4,
    3,
)  # tensors of a block that are alive at once, as wide as the block and its MLP


@dataclass(frozen=True)
class Room:
    """What a target leaves for the groups with one KV cache.

    cache: a name of KV_PRESETS, "none", or None: the recipe's. capacity: bytes. beside: what else is counted, in words.
    """

    cache: str | None
    capacity: int
    beside: str


def activation_bytes(plan: Plan, headers: Headers, context: int, batch: int) -> int:
    """Bytes that serving takes beside weights and cache: 16-bit buffers of a chunk of tokens, and fp32 logits of one
    token of each sequence. An estimate; engines differ.
    """
    tokens = min(CHUNK, context * batch)
    hidden = hidden_size(headers.config) or plan.widest
    vocabulary = text_config(headers.config).get("vocab_size") or 0
    buffers = _HIDDEN_BUFFERS * hidden + _WIDE_BUFFERS * plan.widest
    return tokens * buffers * HALF + batch * vocabulary * FLOAT


def rooms(recipe: Recipe, plan: Plan, headers: Headers, found: Allocatable) -> list[Room]:
    """What the recipe's target leaves, for each KV cache that may be chosen; for a goal other than memory there is one.

    RecipeError with the smallest and the largest that can be had, if the target is smaller than that.
    """
    target = recipe.target
    assert target is not None
    if target.bits_per_weight is not None:
        capacity = int(target.bits_per_weight * found.weights / 8) - found.pinned
        given = [Room(None, capacity, "")]
    elif target.size is not None:
        given = [Room(None, target.size - found.fixed, "")]
    else:
        given = _beside_cache(recipe, plan, headers, found)
    least = found.bytes_of(found.extreme(largest=False))
    possible = [room for room in given if room.capacity >= least]
    if not possible:
        raise RecipeError(_impossible(recipe, found, max(given, key=lambda room: room.capacity)))
    return possible


def _beside_cache(recipe: Recipe, plan: Plan, headers: Headers, found: Allocatable) -> list[Room]:
    target = recipe.target
    assert target is not None
    assert target.memory is not None
    assert target.context is not None
    batch = target.batch or 1
    working = activation_bytes(plan, headers, target.context, batch)
    given = []
    ordinary = all(each and not each.latent for each in find_attention(headers.config, plan.n_blocks))
    names = cache_names(recipe)
    if target.kv_caches is None and not ordinary:
        names = [name for name in names if name in (None, "none")]
    for name in names:
        kv = plan.kv if name is None else cache_scheme(name)
        cache = int(find_model(replace(plan, kv=kv), headers).cache_bytes(target.context, batch))
        rest = target.memory - found.fixed - cache - working
        said = f"KV cache {cache / 2**20:.1f} MiB ({kv or '16 bits'}), activations {working / 2**20:.1f} MiB"
        given.append(Room(name, rest, said))
    return given


def cache_names(recipe: Recipe) -> list[str | None]:
    """The KV caches to choose from: None is that of the recipe, which is not changed."""
    target = recipe.target
    if target is None or target.memory is None:
        return [None]
    if target.kv_caches is not None:
        return list(target.kv_caches)
    if recipe.kv_cache is not None:
        return [None]
    form = recipe.output.format
    return [name for name in CACHES if name == "none" or unstorable_cache(form, KV_PRESETS[name]) is None]


def cache_scheme(name: str) -> KVScheme | None:
    """The scheme of a name of `cache_names`."""
    return None if name == "none" else KV_PRESETS[name]


def _impossible(recipe: Recipe, found: Allocatable, room: Room) -> str:
    """Why no choice of schemes is small enough."""
    target = recipe.target
    assert target is not None
    least, most = (found.bytes_of(found.extreme(largest)) for largest in (False, True))
    if target.bits_per_weight is not None:
        small, large = (8 * (found.pinned + each) / found.weights for each in (least, most))
        return (
            f"target.bits_per_weight: {target.bits_per_weight:g} cannot be met: with these choices it is from "
            f"{small:.3f} to {large:.3f}; give more, or smaller target.choices"
        )
    asked = target.size or target.memory or 0
    beside = asked - room.capacity
    also = (
        f" (beside the linears to choose for, {size_text(beside, 3)}: {room.beside})" if room.beside else ""
    )
    return (
        f"target.{target.goal}: {size_text(asked, 3)} cannot be met: with these choices it takes from "
        f"{size_text(least + beside, 3)} to {size_text(most + beside, 3)}{also}; give more, or smaller target.choices"
    )


def allocate(
    found: Allocatable, damages: Sequence[Sequence[float]], capacity: int, floor: Sequence[int] | None = None
) -> list[int]:
    """The number of each group's scheme: the least damage together in at most `capacity` bytes.

    damages: of each scheme of each group. floor: schemes of which none may become smaller; these fit.
    """
    allowed = [
        [n for n, size in enumerate(group.sizes) if floor is None or size >= group.sizes[floor[place]]]
        for place, group in enumerate(found.groups)
    ]
    items = [
        [Item(group.sizes[n], damage[n]) for n in numbers]
        for group, damage, numbers in zip(found.groups, damages, allowed, strict=True)
    ]
    best = best_choices(items, capacity)
    assert best is not None
    return [numbers[n] for numbers, n in zip(allowed, best, strict=True)]
