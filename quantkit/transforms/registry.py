"""Transforms by name. One `apply(run, config)` each: it changes a block's weights and leaves them ordinary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

EVERY = 10_000_000  # more calibration windows than a recipe may have
Apply = Callable[[Any, Any], list[dict[str, Any]]]
Strength = float | None  # of a searched transform; None: the model as it is


@dataclass(frozen=True)
class Search:
    """How a transform with one setting for the whole model finds it, before the first block is transformed.

    following(config, losses) -> the strengths to try next, given the mean loss of every one tried so far; none when the
    search is over. groups(run): the scaling groups of a block that it changes. try_on(run, strength, input_max):
    transform one block for a trial, without a report; input_max and what is returned: for each set of siblings max|x|
    of each channel of their input, before and behind it. settled(config, strength) -> the config with what was found.
    rounds(config): how many strengths each walk is expected to try; empty if the config wants no search.
    """

    following: Callable[[Any, Mapping[Strength, float]], list[Strength]]
    groups: Callable[[Any], list[Any]]
    try_on: Callable[[Any, Strength, Mapping[tuple[str, ...], Any]], Mapping[tuple[str, ...], Any]]
    settled: Callable[[Any, Strength], Any]
    rounds: Callable[[Any], list[int]]


@dataclass(frozen=True)
class Transform:
    """`apply(run, config) -> report` and what it must be fed.

    apply works in place on the weights held by `run` (`quantkit.calibration.block_run.BlockRun`), whose function must
    stay the same, and returns a report: one dict per place it has looked at, for `scaling` in the manifest. What it
    changes beside the planned linears it puts into `run.changed`. windows(config): how many calibration windows of
    the full-precision stream it looks at. search: of a transform that must see the whole model quantized first.
    """

    apply: Apply
    windows: Callable[[Any], int]
    search: Search | None = None


TRANSFORMS: dict[str, Transform] = {}


def register(
    name: str, windows: Callable[[Any], int], search: Search | None = None
) -> Callable[[Apply], Apply]:
    """Decorator: makes `apply` available as `transforms: [name]`."""

    def add(apply: Apply) -> Apply:
        TRANSFORMS[name] = Transform(apply, windows, search)
        return apply

    return add
