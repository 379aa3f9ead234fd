"""The result of `explain`: where a divergence comes from, as values and as JSON; without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Guess:
    """A token that a model finds likely."""

    text: str
    probability: float


@dataclass(frozen=True)
class WorstToken:
    """A token with a large KL. window, position: its window and its place there, both from 0. kl, loss: in nats.

    before, text, after: the text around it, and the token that follows `before` there. model, baseline: what each
    expected in its place. unit: whose restoration lowers this KL most, to `kl_restored`; None if its window was not run
    again.
    """

    window: int
    position: int
    kl: float
    before: str
    text: str
    after: str
    model: list[Guess]
    baseline: list[Guess]
    loss: float
    baseline_loss: float
    unit: str | None = None
    kl_restored: float | None = None


@dataclass(frozen=True)
class Restored:
    """A unit, and the mean KL over the worst windows while it was the baseline's. removed: by how much that is less."""

    unit: str
    kl_mean: float
    removed: float


@dataclass(frozen=True)
class Explanation:
    """Where the divergence comes from. kl_edges, kl_counts: tokens by KL in nats, n + 1 edges and n counts; smaller
    and larger ones are in the first and last bin. quantiles: share of the tokens -> the KL that they do not exceed.

    windows: numbers of the windows that were run again, kl_mean: the mean KL there, kl_all_restored: with all units
    restored at once, which is what they do not explain. by: what a unit is, in words; restored: by effect.
    """

    tokens: int
    kl_edges: list[float]
    kl_counts: list[int]
    quantiles: dict[str, float]
    worst: list[WorstToken]
    windows: list[int] = field(default_factory=list)
    kl_mean: float | None = None
    kl_all_restored: float | None = None
    by: str | None = None
    restored: list[Restored] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data, the value of "explanation" in an evaluation (docs/evaluation.md)."""
        return asdict(self)
