"""How long the rest of a run takes: a model of what its parts cost, scaled by what the finished ones took.

The cost of a block is in any unit; one finished block gives the seconds per unit, more of them a better mean. Work that
is done once for all blocks (finding out which linears can be scaled together) is counted apart. Phases before and after
the blocks are expected in seconds, and once one of them reports how far it is, its own pace replaces what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence


class Estimate:
    """Seconds that remain; nothing here reads a clock.

    costs: of every block, in one unit. done: blocks that an earlier run has finished, which say nothing about the pace.
    predicted: whether the costs are seconds, expected by what this machine was measured to do; the first blocks then
    correct them.
    """

    def __init__(self, costs: Sequence[float], done: int = 0, predicted: bool = False) -> None:
        self._costs, self._predicted = list(costs), predicted
        self._open = set(range(done, len(self._costs)))
        self._seconds = self._spent = 0.0
        self._after: dict[str, float | None] = {}

    def block(self, index: int, seconds: float, once: float = 0.0) -> None:
        """Block `index` took `seconds`, of which `once` will not be needed again."""
        self._open.discard(index)
        self._seconds += max(0.0, seconds - once)
        self._spent += self._costs[index]

    def expect(self, phase: str, seconds: float | None) -> None:
        """A phase beside the blocks will take about `seconds`; None: nothing is known about it yet."""
        self._after[phase] = seconds

    def progressed(self, phase: str, share: float, seconds: float) -> None:
        """A phase has come to `share`, 0 to 1, in `seconds`; at 1 it is over."""
        if share >= 1:
            self._after.pop(phase, None)
        elif share > 0:
            self._after[phase] = seconds / share - seconds

    @property
    def left(self) -> float | None:
        """Seconds that remain; None while nothing is known about the pace of the open blocks or about a phase."""
        after = [seconds for seconds in self._after.values() if seconds is not None]
        unknown = self._open and not self._spent and not self._predicted
        if len(after) < len(self._after) or unknown:
            return None
        pace = self._seconds / self._spent if self._spent else float(self._predicted)
        return pace * sum(self._costs[i] for i in self._open) + sum(after)
