"""The next allocation after one that a gate has refused: more bytes, where they undo the most damage; without torch."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.allocation.groups import Allocatable
from quantkit.allocation.targets import allocate

LEAST_STEP = 1 / 16  # bits per weight that an attempt has more than the one before
MARGIN = 0.95  # of the limit is aimed at, as damages are estimates
_LOOKS = 24  # bisections at most


def next_choice(
    found: Allocatable, damages: Sequence[Sequence[float]], chosen: Sequence[int], excess: float, most: int
) -> list[int] | None:
    """The smallest allocation that is expected to pass; None if nothing larger is allowed.

    What was measured and the damages of `chosen` together give what a unit of damage amounts to, so the damage has to
    fall by `excess`, how many times the limit the worst interval reaches. No group gets less than it has. most: bytes.
    """

    def total(numbers: Sequence[int]) -> float:
        return sum(damage[number] for damage, number in zip(damages, numbers, strict=True))

    now = found.bytes_of(chosen)
    low = now + max(1, int(LEAST_STEP * found.weights / 8))
    high = min(most, found.bytes_of(found.extreme(largest=True)))
    if high <= now:
        return None
    wanted = MARGIN * total(chosen) / max(excess, 1.0)
    best = allocate(found, damages, high, chosen)
    low = min(low, high)
    for _ in range(_LOOKS):
        if low >= high:
            break
        middle = (low + high) // 2
        tried = allocate(found, damages, middle, chosen)
        if total(tried) <= wanted:
            best, high = tried, middle
        else:
            low = middle + 1
    if found.bytes_of(best) > now:
        return best
    return _cheapest(found, chosen, most)


def _cheapest(found: Allocatable, chosen: Sequence[int], most: int) -> list[int] | None:
    """Where no damage is known to fall: one step up for every group, as far as the bytes reach; None without one."""
    taken, left = list(chosen), most - found.bytes_of(chosen)
    for place, group in enumerate(found.groups):
        above = [n for n, size in enumerate(group.sizes) if size > group.sizes[chosen[place]]]
        step = min(above, key=lambda n: group.sizes[n], default=None)
        if step is not None and group.sizes[step] - group.sizes[chosen[place]] <= left:
            left -= group.sizes[step] - group.sizes[chosen[place]]
            taken[place] = step
    return taken if taken != list(chosen) else None
