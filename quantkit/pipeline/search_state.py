"""What a search has found so far, kept line by line in its journal: sensitivities, costs of caches, attempts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from quantkit.allocation import damage
from quantkit.allocation.damage import GroupRecord
from quantkit.allocation.explicit import explicit_recipe
from quantkit.allocation.gate import Check
from quantkit.allocation.groups import Allocatable, Group
from quantkit.allocation.targets import Room, allocate, rooms
from quantkit.checkpoint.journal import Journal
from quantkit.pipeline.cache_cost import cache_damages
from quantkit.pipeline.run import Run
from quantkit.pipeline.sensitivity import WINDOWS, Asked, measure
from quantkit.recipe.recipe import Recipe
from quantkit.validation import search_space

MEASURING = "measuring sensitivities"


@dataclass
class Attempt:
    """One allocation, made and evaluated. chosen: the scheme's number of each group. cache: as of `Room`.

    predicted: the sum of its damages, None where none were measured. checks: of the gate, none without one.
    """

    number: int
    chosen: list[int]
    cache: str | None
    bits_per_weight: float
    predicted: float | None
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def excess(self) -> float:
        """How many times its limit the worst interval reaches; 0 without a gate."""
        return max((check.excess for check in self.checks), default=0.0)

    def __str__(self) -> str:
        return "; ".join(map(str, self.checks))


class State:
    """found: what bits can be given to. attempts: those that are made. moving: the one that is being moved away."""

    def __init__(self, run: Run, journal: Journal) -> None:
        self.run, self.journal = run, journal
        self.found: Allocatable = search_space(run.recipe, run.plan, run.source.headers)
        self.attempts: list[Attempt] = []
        self.moving: Attempt | None = None
        self._records: dict[str, GroupRecord] = {}
        self._caches: dict[str, float] = {"none": 0.0}
        for entry in journal.entries:
            self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        """What an interrupted run has found."""
        for value in entry.get("measured", ()):
            record = damage.from_json(value)
            self._records[record.name] = record
        self._caches |= entry.get("caches", {})
        if "attempt" in entry:
            given = dict(entry["attempt"])
            given["checks"] = [Check(**check) for check in given["checks"]]
            self.attempts.append(Attempt(**given))
        if "moving" in entry:
            self.moving = self.attempts[entry["moving"]]

    @property
    def estimator(self) -> str:
        target = self.run.recipe.target
        return (target.sensitivity if target is not None else None) or damage.DEFAULT

    @property
    def windows(self) -> int:
        target = self.run.recipe.target
        return (target.windows if target is not None else None) or WINDOWS

    @functools.cached_property
    def rooms(self) -> dict[str | None, Room]:
        """What the target leaves, by KV cache; empty without a target of size."""
        recipe = self.run.recipe
        if recipe.target is None or recipe.target.goal is None:
            return {}
        given = rooms(recipe, self.run.plan, self.run.source.headers, self.found)
        return {room.cache: room for room in given}

    def first(self) -> tuple[list[int], str | None]:
        """(the scheme's number of each group, the KV cache) to begin with: what the target leaves room for, or, without
        a target of size, what the recipe says.
        """
        if not self.rooms:
            return self.found.now, None
        tried: list[tuple[float, int, list[int], str | None]] = []
        for cache, room in self.rooms.items():
            chosen = allocate(self.found, self.damages(), room.capacity)
            total = sum(d[n] for d, n in zip(self.damages(), chosen, strict=True))
            tried.append((total + self._cache_damage(cache), len(tried), chosen, cache))
        _, _, chosen, cache = min(tried)
        return chosen, cache

    def most(self, cache: str | None) -> int:
        """Bytes that the groups of an attempt may take: what the gate allows, and the target if it is in bytes."""
        gate, target = self.run.recipe.gate, self.run.recipe.target
        assert gate is not None
        bits = int(gate.max_bits_per_weight * self.found.weights / 8) - self.found.pinned
        if target is None or target.goal in (None, "bits_per_weight"):
            return bits
        return min(bits, self.rooms[cache].capacity)

    def damages(self) -> list[list[float]]:
        """Of each scheme of each group; what is not known yet is measured."""
        missing = [group for group in self.found.groups if group.name not in self._records]
        if missing:
            run = self.run
            run.progress.message(f"measuring {len(missing)} groups of linears with {self.estimator}")
            with run.clock("search"):
                asked = [Asked(group, tuple(self._anchors(group))) for group in missing]
                measure(
                    run,
                    asked,
                    self.windows,
                    self._measured,
                    lambda share: run.progress.phase(MEASURING, share),
                )
        return damage.damages([self._records[group.name] for group in self.found.groups], self.estimator)

    def _anchors(self, group: Group) -> list[int]:
        target = self.run.recipe.target
        aim = None if target is None else target.bits_per_weight
        if aim is None:
            capacity = max(
                (room.capacity for room in self.rooms.values()), default=self.found.bytes_of(self.found.now)
            )
            aim = 8 * (self.found.pinned + capacity) / self.found.weights
        return damage.anchors(group.sizes, group.weights, aim, self.estimator)

    def _measured(self, records: list[GroupRecord]) -> None:
        self.journal.append({"measured": [record.to_json() for record in records]})
        self._records |= {record.name: record for record in records}

    def _cache_damage(self, cache: str | None) -> float:
        """0 for the recipe's own, which is not chosen."""
        if cache is None or len(self.rooms) == 1:
            return 0.0
        if cache not in self._caches:
            missing = [name for name in self.rooms if name is not None and name not in self._caches]
            self.run.progress.message(f"measuring the KV caches {', '.join(missing)}")
            with self.run.clock("search"):
                found = cache_damages(self.run, missing, self.windows)
            self.journal.append({"caches": found})
            self._caches |= found
        return self._caches[cache]

    def predicted(self, chosen: Sequence[int]) -> float | None:
        """The sum of the damages, if they are known."""
        if any(group.name not in self._records for group in self.found.groups):
            return None
        return sum(d[n] for d, n in zip(self.damages(), chosen, strict=True))

    def explicit(self, chosen: Sequence[int], cache: str | None) -> Recipe:
        return explicit_recipe(self.run.recipe, self.run.plan, self.found, chosen, cache)

    def attempted(self, attempt: Attempt) -> None:
        """Keep an attempt that was made."""
        self.journal.append({"attempt": asdict(attempt)})
        self.attempts.append(attempt)

    def moved(self, attempt: Attempt) -> None:
        """From now on this attempt is being moved to its place."""
        self.journal.append({"moving": attempt.number})
        self.moving = attempt

    def record(self, kept: Attempt) -> dict[str, Any]:
        """What `quantkit.allocation.json` says beside its schema and identity (docs/mixed-precision.md)."""
        recipe, known = self.run.recipe, bool(self._records)
        damages = self.damages() if known else [[] for _ in self.found.groups]
        goal = None if recipe.target is None else recipe.target.goal
        notes = [
            f"{kept.bits_per_weight:.3f} bits per weight of the quantized linears, {len(self.found.groups)} groups"
        ]
        if kept.cache is not None:
            notes.append(f"KV cache chosen: {kept.cache}; {self.rooms[kept.cache].beside}")
        return {
            "goal": goal,
            "estimator": self.estimator if known else None,
            "windows": self.windows if known else None,
            "passed": kept.passed,
            "missed": [f"gate: {check}" for check in kept.checks if not check.passed],
            "why": "more bits than max_bits_per_weight or the target allow would be needed",
            "notes": [*notes, *(f"gate: {check}" for check in kept.checks)],
            "caches": {name: kl for name, kl in self._caches.items() if len(self.rooms) > 1},
            "kept": kept.number,
            "attempts": [asdict(attempt) | {"passed": attempt.passed} for attempt in self.attempts],
            "groups": [
                self._group(group, kept.chosen[place], damages[place])
                for place, group in enumerate(self.found.groups)
            ],
        }

    def _group(self, group: Group, chosen: int, damages: Sequence[float]) -> dict[str, Any]:
        known = self._records.get(group.name)
        return {
            "name": group.name,
            "block": group.block,
            "linears": len(group.layers),
            "weights": group.weights,
            "schemes": list(map(str, group.schemes)),
            "bytes": list(group.sizes),
            "chosen": chosen,
            "damages": list(damages),
        } | ({} if known is None else {k: v for k, v in known.to_json().items() if k != "name"})
