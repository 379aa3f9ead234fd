"""Where the time of a run goes, per phase and per block: wall and CPU seconds (user + system, all threads)."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.checkpoint.records import BlockFacts

_STATM = Path("/proc/self/statm")


class Clock:
    """`with clock("calibrate"): ...` adds to that phase; phases must not nest.

    now: the clock that is read for wall time, in seconds. A measurement on a machine with other work may replace it by
    time.process_time.
    """

    now: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.blocks: list[BlockFacts] = []
        self._start = self._last = self.now()
        self._last_cpu = time.process_time()

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

    def block(self, name: str, begin: bool = False) -> None:
        """A block is finished, or the work on blocks begins."""
        wall, cpu = self.now(), time.process_time()
        if not begin:
            taken = {"seconds": wall - self._last, "cpu_seconds": cpu - self._last_cpu}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            self.blocks.append(BlockFacts(name=name, **taken, rss_bytes=_in_use(), peak_rss_bytes=peak))
        self._last, self._last_cpu = wall, cpu


def _in_use() -> int | None:
    """Bytes of memory that this process has in use; None where the system does not say."""
    try:
        pages = int(_STATM.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()
