"""The protocol by which a run reports its progress, and a display that shows nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a run tells its display. Times are seconds; `left` is what remains of the whole run, None while unknown."""

    def start(self, total_blocks: int, title: str) -> None:
        """The work on blocks begins."""

    def block(self, index: int, name: str, note: str = "", left: float | None = None) -> None:
        """Block `index` is finished: index + 1 of them are. The last index is what lies outside the blocks."""

    def phase(self, name: str, share: float, left: float | None = None) -> None:
        """Work that is not by blocks (reading the source, verifying, evaluating) has come to `share`, 0 to 1."""

    def message(self, text: str) -> None:
        """Something worth a line."""

    def finish(self) -> None:
        """Nothing more will come; may be called twice."""


class Silent:
    """The progress protocol, without a display."""

    def start(self, total_blocks: int, title: str) -> None: ...

    def block(self, index: int, name: str, note: str = "", left: float | None = None) -> None: ...

    def phase(self, name: str, share: float, left: float | None = None) -> None: ...

    def message(self, text: str) -> None: ...

    def finish(self) -> None: ...
