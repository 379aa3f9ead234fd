"""Where the time of a run goes, per phase: wall and CPU seconds (user + system, all threads)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """`with clock("calibrate"): ...` adds to that phase; phases must not nest.

    now: the clock that is read for wall time, in seconds. A measurement on a machine with other work may replace it by
    time.process_time.
    """

    now: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._start = self.now()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        wall, cpu = self.now(), time.process_time()
        try:
            yield
        finally:
            self.wall[phase] = self.wall.get(phase, 0.0) + self.now() - wall
            self.cpu[phase] = self.cpu.get(phase, 0.0) + time.process_time() - cpu

    @property
    def total(self) -> float:
        """Wall seconds since the clock was made."""
        return self.now() - self._start
