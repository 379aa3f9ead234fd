"""The multiple-choice knapsack, exactly: one choice per group, the least damage whose sizes fit into a capacity.

Groups are taken in one after the other, and of all ways to choose for the groups so far only those are kept that no
other way beats in both size and damage (Nemhauser and Ullmann 1969). A way is dropped as soon as the linear relaxation
of the groups to come (Sinha and Zoltners 1979), a convex function of the room that is left, shows that it cannot end
better than a solution that is known. Nothing is rounded: sizes are integers, such as bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

_SLACK = 1e-12  # of all damages: sums in another order differ by less, so no optimum is dropped


@dataclass(frozen=True)
class Item:
    """One choice of a group: its size, an integer of at least 0, and the damage that it does, finite."""

    size: int
    damage: float


@dataclass(frozen=True)
class _Step:
    """From one choice of a group's hull to the next larger one: more bytes, less damage."""

    slope: float
    place: int
    size: int
    fall: float


class _Relaxed:
    """The groups from one on, if parts of choices could be taken: bounds from below, and solutions, by room left."""

    def __init__(self, hulls: Sequence[Sequence[Item]], first: int) -> None:
        self._smallest = sum(hull[0].size for hull in hulls[first:])
        self._worst = sum(hull[0].damage for hull in hulls[first:])
        self._steps = sorted(_steps(hulls, first), key=lambda step: (step.slope, step.place))
        self._sizes = [*accumulate((step.size for step in self._steps), initial=self._smallest)]
        self._damages = [*accumulate((step.fall for step in self._steps), initial=self._worst)]

    def bound(self, room: int) -> float | None:
        """No solution has less damage; None if even the smallest choices do not fit."""
        place = bisect_right(self._sizes, room) - 1
        if place < 0:
            return None
        if place == len(self._steps):
            return self._damages[-1]
        step = self._steps[place]
        return self._damages[place] + step.fall * (room - self._sizes[place]) / step.size

    def solution(self, room: int) -> float:
        """The damage of some solution that fits: the best steps first, those that no longer fit left out."""
        left, damage = room - self._smallest, self._worst
        ended: set[int] = set()  # groups whose next step does not fit
        for step in self._steps:
            if step.place not in ended:
                if step.size > left:
                    ended.add(step.place)
                else:
                    left, damage = left - step.size, damage + step.fall
        return damage


def best_choices(groups: Sequence[Sequence[Item]], capacity: int) -> list[int] | None:
    """The number of the choice of each group, of least damage together; None if the smallest ones do not fit.

    Of several optima, one of least size. groups: at least one choice each. The time is that of the ways that are kept:
    some seconds for 400 groups of 12 choices, more where sizes or damages are nearly alike.
    """
    fronts = [_front(items) for items in groups]
    hulls = [_hull([items[n] for n in front]) for items, front in zip(groups, fronts, strict=True)]
    # Groups with much at stake first: those that are left then have little to say, so their bound is close.
    order = sorted(range(len(groups)), key=lambda g: hulls[g][-1].damage - hulls[g][0].damage)
    sorted_hulls = [hulls[group] for group in order]
    relaxed = [_Relaxed(sorted_hulls, first) for first in range(len(order) + 1)]
    if relaxed[0].bound(capacity) is None:
        return None
    known = relaxed[0].solution(capacity)
    slack = _SLACK * sum(max(abs(item.damage) for item in items) for items in groups)
    ways: list[tuple[int, float, Any]] = [(0, 0.0, None)]  # size, damage, (last choice, those before it)
    for group, rest in zip(order, relaxed[1:], strict=True):
        longer, least = [], None
        for number in fronts[group]:
            item = groups[group][number]
            for size, damage, before in ways:
                room, total = capacity - size - item.size, damage + item.damage
                bound = rest.bound(room)
                if bound is None or total + bound > known + slack:
                    continue
                longer.append((size + item.size, total, (number, before)))
                if least is None or total + bound < least[0]:
                    least = (total + bound, total, room)
        if least is not None:
            known = min(known, least[1] + rest.solution(least[2]))
        ways = _undominated(longer)
    chosen = min(ways, key=lambda way: (way[1], way[0]))[2]
    found = [0] * len(groups)
    for group in reversed(order):
        found[group], chosen = chosen
    return found


def _front(items: Sequence[Item]) -> list[int]:
    """The numbers of the choices that no other beats in both size and damage, by rising size."""
    found: list[int] = []
    for number in sorted(range(len(items)), key=lambda n: (items[n].size, items[n].damage)):
        if not found or items[number].damage < items[found[-1]].damage:
            found.append(number)
    return found


def _hull(front: Sequence[Item]) -> list[Item]:
    """The lower convex hull of choices by rising size and falling damage."""
    hull: list[Item] = []
    for item in front:
        while len(hull) > 1 and _above(hull[-2], hull[-1], item):
            hull.pop()
        hull.append(item)
    return hull


def _above(first: Item, middle: Item, last: Item) -> bool:
    """Whether the middle choice lies on or above the line between the other two."""
    here = (middle.damage - first.damage) * (last.size - first.size)
    return here >= (last.damage - first.damage) * (middle.size - first.size)


def _steps(hulls: Sequence[Sequence[Item]], first: int) -> Iterator[_Step]:
    for place, hull in enumerate(hulls[first:], first):
        for before, after in pairwise(hull):
            size, fall = after.size - before.size, after.damage - before.damage
            yield _Step(fall / size, place, size, fall)


def _undominated(ways: list[tuple[int, float, Any]]) -> list[tuple[int, float, Any]]:
    """The ways that no other beats in both size and damage."""
    ways.sort(key=lambda way: (way[0], way[1]))
    found: list[tuple[int, float, Any]] = []
    for way in ways:
        if not found or way[1] < found[-1][1]:
            found.append(way)
    return found
