"""The knapsack is exact: it equals trying everything, on small cases of every kind."""

import itertools
import random

import pytest

from quantkit.allocation.knapsack import Item, best_choices


def everything(groups, capacity):
    """(damage, size) of the best of all ways; None if none fits."""
    ways = itertools.product(*groups)
    found = [(sum(i.damage for i in way), sum(i.size for i in way)) for way in ways]
    fitting = [(damage, size) for damage, size in found if size <= capacity]
    return min(fitting, default=None)


def case(seed):
    rng = random.Random(seed)
    damage = rng.choice(
        [rng.random, lambda: float(rng.randint(0, 4)), lambda: rng.random() - 0.3, lambda: 0.0]
    )
    size = rng.choice(
        [lambda: rng.randint(0, 40), lambda: 8 * rng.randint(1, 5), lambda: rng.randint(10**9, 2 * 10**9)]
    )
    groups = [[Item(size(), damage()) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 6))]
    least, most = (sum(pick(item.size for item in items) for items in groups) for pick in (min, max))
    return groups, rng.randint(least - least // 4, most + 1)


@pytest.mark.parametrize("first", range(0, 1000, 250))
def test_the_best_choices_equal_trying_everything(first):
    for seed in range(first, first + 250):
        groups, capacity = case(seed)
        best, chosen = everything(groups, capacity), best_choices(groups, capacity)
        assert (best is None) == (chosen is None), seed
        if best is not None:
            picked = [items[number] for items, number in zip(groups, chosen, strict=True)]
            assert sum(item.size for item in picked) <= capacity
            assert sum(item.damage for item in picked) == pytest.approx(best[0], abs=1e-12), seed


def test_of_equal_damage_the_smaller_is_taken():
    assert best_choices([[Item(9, 1.0), Item(3, 1.0), Item(5, 1.0)]], 10) == [1]


def test_more_room_never_does_more_damage():
    rng = random.Random(5)
    groups = [[Item(bits * (n + 3), 4.0**-bits * rng.random()) for bits in (2, 3, 4, 8)] for n in range(30)]
    least = sum(items[0].size for items in groups)
    totals = []
    for capacity in range(least, 4 * least, 97):
        chosen = best_choices(groups, capacity)
        totals.append(sum(items[n].damage for items, n in zip(groups, chosen, strict=True)))
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


def test_what_the_relaxation_would_take_apart_is_chosen_whole():
    # By damage per byte the first group's step comes first and leaves no room for the second's, which gains more.
    groups = [[Item(0, 6.0), Item(6, 0.0)], [Item(0, 9.0), Item(10, 0.0)]]
    assert best_choices(groups, 10) == [0, 1]
