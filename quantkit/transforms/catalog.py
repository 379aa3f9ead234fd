"""Every transform there is, by the name a recipe uses."""

from __future__ import annotations

from quantkit.transforms import awq, smoothquant, smoothquant_plus  # noqa: F401  (importing registers)
from quantkit.transforms.registry import TRANSFORMS, Transform


def transform(name: str) -> Transform:
    """The registered transform; an unknown name lists the known ones."""
    if name not in TRANSFORMS:
        raise KeyError(f"unknown transform {name!r}; known: {', '.join(sorted(TRANSFORMS))}")
    return TRANSFORMS[name]
