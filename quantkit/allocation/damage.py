"""From what was measured of each group to the damage of each of its schemes, in one unit; without torch.

Three things are known of a group: by scheme, the error that the recipe's algorithm leaves, sum tr(dW H dW^T) / 2 over
its linears (H = 2/N sum x x^T, so this is the mean squared error of their outputs); the same of a weight of zeros; and
for one scheme or several, its anchors, the KL of the model in which this group alone has that scheme. Damages of groups
are taken to add up (docs/mixed-precision.md shows how well they do).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ESTIMATORS = ("kl", "scaled", "relative", "error")
DEFAULT = "scaled"


@dataclass(frozen=True, kw_only=True)
class GroupRecord:
    """What was measured of a group. errors: by the number of the scheme. norm: of a weight of zeros.

    kl: number of an anchor -> mean KL of the model with this group alone in that scheme, in nats; kl_se: its standard
    error over windows, None with one window. anchor_errors: of the very weights that ran, which for experts are rounded
    to nearest.
    """

    name: str
    errors: list[float]
    norm: float
    kl: dict[int, float]
    kl_se: dict[int, float | None]
    anchor_errors: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data, in which the numbers of schemes are texts."""
        return {
            key: {str(number): each for number, each in value.items()} if isinstance(value, dict) else value
            for key, value in asdict(self).items()
        }


def damages(records: Sequence[GroupRecord], estimator: str) -> list[list[float]]:
    """The damage of each scheme of each group: KL in nats for "kl" and "scaled", else errors of outputs."""
    return [_damages(record, estimator) for record in records]


def _damages(record: GroupRecord, estimator: str) -> list[float]:
    if estimator == "error":
        return list(record.errors)
    if estimator == "relative":
        return [error / record.norm if record.norm > 0 else 0.0 for error in record.errors]
    known = sorted(
        (record.anchor_errors[number], max(kl, 0.0))
        for number, kl in record.kl.items()
        if record.anchor_errors[number] > 0
    )
    if not known:
        return [0.0] * len(record.errors)
    if estimator == "kl":
        return [
            max(record.kl[n], 0.0) if n in record.kl else _between(known, error)
            for n, error in enumerate(record.errors)
        ]
    return [_between(known, error) for error in record.errors]


def _between(known: Sequence[tuple[float, float]], error: float) -> float:
    """The KL at an error, from (error, KL) of the anchors by rising error: a power law between two of them, and in
    proportion to the error beyond the first and the last.
    """
    if error <= 0:
        return 0.0
    below = [each for each in known if each[0] <= error]
    above = [each for each in known if each[0] > error]
    if not below or not above:
        nearest, kl = above[0] if above else below[-1]
        return kl * error / nearest
    (low, kl_low), (high, kl_high) = below[-1], above[0]
    if kl_low <= 0 or kl_high <= 0:
        return kl_low + (kl_high - kl_low) * (error - low) / (high - low)
    share = math.log(error / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(kl_low) + share * math.log(kl_high))


def anchors(sizes: Sequence[int], weights: int, bits: float, estimator: str) -> list[int]:
    """The numbers of the schemes whose KL is measured. bits: the bits per weight aimed at.

    All for "kl"; for "scaled" the one whose bits per weight are closest to those aimed at, and none for the others.
    """
    if estimator == "kl":
        return list(range(len(sizes)))
    if estimator != "scaled":
        return []
    return [min(range(len(sizes)), key=lambda number: abs(8 * sizes[number] / weights - bits))]


def from_json(value: Mapping[str, object]) -> GroupRecord:
    """A record as a journal has it, where the numbers of schemes became texts."""
    given = dict(value)
    for key in ("kl", "kl_se", "anchor_errors"):
        each = given[key]
        assert isinstance(each, Mapping)
        given[key] = {int(number): kept for number, kept in each.items()}
    return GroupRecord(**given)  # type: ignore[arg-type]
