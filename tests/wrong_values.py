"""Random damage to JSON values, for tests with fixed seeds."""

import copy
import random
from typing import Any

VALUES = (
    None,
    True,
    0,
    -1,
    7,
    1.5,
    2**31,
    10**18,
    "",
    "x",
    "../x",
    "\0",
    "re:(",
    [],
    [1],
    {},
    {"a": 1},
    [[]],
)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """The path to every value inside nested lists and dictionaries."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in items for place in ((*at, key), *places(each, (*at, key)))]


def damaged(value: Any, draw: random.Random, times: int = 1) -> Any:
    """A copy in which values at random places were replaced, removed or given another key."""
    value = copy.deepcopy(value)
    for _ in range(times):
        *above, last = draw.choice(places(value) or [()]) or ("",)
        inside = value
        for key in above:
            inside = inside[key]
        what = draw.randrange(4)
        if not isinstance(inside, dict | list) or not inside:
            continue
        if what == 0:
            del inside[last]
        elif what == 1 and isinstance(inside, dict):
            inside[draw.choice(["x", "../x", "name", "a\0b"])] = inside.pop(last)
        else:
            inside[last] = copy.deepcopy(draw.choice(VALUES))
    return value
