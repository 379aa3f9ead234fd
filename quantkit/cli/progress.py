"""Progress of a long run on standard error: a bar on a terminal, plain lines elsewhere.

Both show what the run reports through `quantkit.pipeline.progress.Progress`: finished blocks, the phases around them
(reading the source, verifying, evaluating), and the time left of the whole run as the run estimates it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from quantkit.cli.output import Screen
from quantkit.cli.terminal import say, visible
from quantkit.device import launch
from quantkit.pipeline.progress import Silent

_STATM = Path("/proc/self/statm")
_PHASE_STEP = 10.0  # seconds between two lines about the same phase


def resident_bytes() -> int | None:
    """Memory the process holds right now; None where the system does not say."""
    if not _STATM.exists():
        return None
    import resource

    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


def _memory() -> str:
    held = resident_bytes()
    return f"{held / 2**20:,.0f} MiB" if held is not None else ""


def duration(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    whole = max(0, round(seconds))
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class _Left(ProgressColumn):
    """Time left, counted down from the last estimate, and the memory held."""

    def render(self, task: Task) -> Text:
        ends = task.fields.get("ends")
        left = "time left unknown" if ends is None else f"{duration(ends - time.monotonic())} left"
        return Text(", ".join(part for part in (left, _memory()) if part))


class TerminalProgress:
    """Draws one bar: finished blocks, or the share of a phase."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[where]}", markup=False),
            _Left(),
            console=Screen(file=sys.stderr),
            transient=True,
        )
        self._task: TaskID | None = None
        self._title, self._total = "", 0

    def start(self, total_blocks: int, title: str) -> None:
        self._title, self._total = title, total_blocks
        self._show(title, 0, f"0/{total_blocks}", None)

    def block(self, index: int, name: str, note: str = "", left: float | None = None) -> None:
        done = min(index + 1, self._total)
        share = done / self._total if self._total else 1
        self._show(self._title, share, f"{done}/{self._total} {name} {note}".rstrip(), left)

    def phase(self, name: str, share: float, left: float | None = None) -> None:
        self._show(name, share, f"{share:.0%}", left)

    def message(self, text: str) -> None:
        self._bar.console.print(text)

    def finish(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
            self._bar.stop()

    def _show(self, title: str, share: float, where: str, left: float | None) -> None:
        """Draw one state; left: seconds from now."""
        ends = None if left is None else time.monotonic() + left
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=1, where="")
        where = visible(where)
        self._bar.update(self._task, description=visible(title), completed=share, where=where, ends=ends)


class PlainProgress:
    """Writes a line per finished block, and one every ten seconds within a phase."""

    def __init__(self) -> None:
        self._total, self._title = 0, ""
        self._phase, self._said = "", 0.0

    def start(self, total_blocks: int, title: str) -> None:
        self._total, self._title, self._phase = total_blocks, title, ""
        self.message(f"{title}: {total_blocks} blocks")

    def block(self, index: int, name: str, note: str = "", left: float | None = None) -> None:
        done = min(index + 1, self._total)
        self._line(f"{self._title} {done}/{self._total} {name}", note, left)

    def phase(self, name: str, share: float, left: float | None = None) -> None:
        now = time.monotonic()
        if name == self._phase and now - self._said < _PHASE_STEP:
            return
        self._phase, self._said = name, now
        self._line(f"{name} {share:.0%}", "", left)

    def _line(self, what: str, note: str, left: float | None) -> None:
        time_left = "" if left is None else f"{duration(left)} left"
        self.message(", ".join(part for part in (what, note, time_left, _memory()) if part))

    def message(self, text: str) -> None:
        say(text, err=True)
        sys.stderr.flush()

    def finish(self) -> None:
        self._total = 0


def make_progress() -> TerminalProgress | PlainProgress | Silent:
    """The display that fits standard error; of several processes only the first has one."""
    if launch().rank:
        return Silent()
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()
