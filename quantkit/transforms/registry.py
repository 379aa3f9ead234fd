"""Transforms by name. One `apply(run, config)` each: it changes a block's weights and leaves them ordinary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EVERY = 10_000_000  # more calibration windows than a recipe may have
Apply = Callable[[Any, Any], list[dict[str, Any]]]


@dataclass(frozen=True)
class Transform:
    """`apply(run, config) -> report` and what it must be fed.

    apply works in place on the weights held by `run` (`quantkit.calibration.block_run.BlockRun`), whose function must
    stay the same, and returns a report: one dict per place it has looked at, for `scaling` in the manifest. What it
    changes beside the planned linears it puts into `run.changed`. windows(config): how many calibration windows of
    the full-precision stream it looks at.
    """

    apply: Apply
    windows: Callable[[Any], int]


TRANSFORMS: dict[str, Transform] = {}


def register(name: str, windows: Callable[[Any], int]) -> Callable[[Apply], Apply]:
    """Decorator: makes `apply` available as `transforms: [name]`."""

    def add(apply: Apply) -> Apply:
        TRANSFORMS[name] = Transform(apply, windows)
        return apply

    return add
