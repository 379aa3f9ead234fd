"""Every algorithm there is, by the name a recipe uses."""

from __future__ import annotations

from quantkit.algorithms import gptq, rtn  # noqa: F401  (importing registers)
from quantkit.algorithms.registry import ALGORITHMS, Algorithm


def algorithm(name: str) -> Algorithm:
    """The registered algorithm; an unknown name lists the known ones."""
    if name not in ALGORITHMS:
        raise KeyError(f"unknown algorithm {name!r}; known: {', '.join(sorted(ALGORITHMS))}")
    return ALGORITHMS[name]
