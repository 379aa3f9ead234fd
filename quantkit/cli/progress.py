"""Progress of a long run: a bar with block, ETA and memory on a terminal, plain lines elsewhere (stderr)."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int | None:
    """Memory the process holds right now; None where the system does not tell."""
    if not _STATM.exists():
        return None
    import resource

    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


def _memory() -> str:
    held = resident_bytes()
    return f"{held / 2**20:,.0f} MiB" if held is not None else ""


class TerminalProgress:
    """Draws a bar. `block` is called when a block is done."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[where]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = None

    def start(self, total_blocks: int, title: str) -> None:
        self.finish()
        self._bar.start()
        self._task = self._bar.add_task(title, total=total_blocks, where="", memory=_memory())

    def block(self, index: int, name: str, note: str = "", left: float | None = None) -> None:
        where = f"{name} {note}".strip()
        if self._task is not None:
            self._bar.update(self._task, completed=index + 1, where=where, memory=_memory())

    def phase(self, name: str, share: float, left: float | None = None) -> None: ...

    def message(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def finish(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
            self._bar.stop()


class PlainProgress:
    """Writes a line per block."""

    def __init__(self) -> None:
        self._total, self._title, self._first, self._began = 0, "", 0, 0.0

    def start(self, total_blocks: int, title: str) -> None:
        self._total, self._title, self._first, self._began = total_blocks, title, None, time.monotonic()
        self.message(f"{title}: {total_blocks} blocks")

    def block(self, index: int, name: str, note: str = "", left: float | None = None) -> None:
        if self._first is None:
            self._first = index
        rate = (time.monotonic() - self._began) / (index - self._first + 1)
        left = rate * max(0, self._total - index - 1)
        done = min(index + 1, self._total)
        parts = [f"{self._title} {done}/{self._total} {name}", note, f"eta {left:.0f} s", _memory()]
        self.message(", ".join(part for part in parts if part))

    def phase(self, name: str, share: float, left: float | None = None) -> None: ...

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def finish(self) -> None:
        self._total = 0


def make_progress() -> TerminalProgress | PlainProgress:
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()
