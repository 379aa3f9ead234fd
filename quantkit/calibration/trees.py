"""Values inside nested tuples, lists and dictionaries, such as the arguments of a call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

Place = tuple[Any, ...]  # the keys and indices that lead to a value inside (args, kwargs)


def leaves(tree: Any, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """(place, value) of everything inside nested tuples, lists and dictionaries that is none of these itself."""
    if isinstance(tree, tuple | list):
        for number, item in enumerate(tree):
            yield from leaves(item, (*at, number))
    elif isinstance(tree, MutableMapping):
        for key, item in tree.items():
            yield from leaves(item, (*at, key))
    else:
        yield at, tree


def rebuilt(tree: Any, change: Callable[[Place, Any], Any], at: Place = ()) -> Any:
    """A copy of nested containers in which `change(place, value)` has replaced every leaf and every dictionary.

    A dictionary is offered after its items were replaced; tuples and lists are not offered.
    """
    if isinstance(tree, tuple | list):
        items = [rebuilt(item, change, (*at, number)) for number, item in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, MutableMapping):
        own = copy.copy(tree)
        for key, item in tree.items():
            own[key] = rebuilt(item, change, (*at, key))
        return change(at, own)
    return change(at, tree)
