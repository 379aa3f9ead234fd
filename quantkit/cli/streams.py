"""Standard output and error of the process: closed, full, or read by a program that has gone away.

Standard error carries progress and messages only, so what cannot be written there is dropped and the work goes on.
Standard output carries results, so a write that fails there ends the command with a message and exit code 1.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO


class OutputLost(Exception):
    """Standard output does not take what the command prints."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to standard output: {error.strerror or error}")
        self.reader_gone = isinstance(error, BrokenPipeError)


class _Output(io.FileIO):
    """Standard output; a failed write raises `OutputLost`, which no code between here and `run` takes for its own."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data) or 0
        except OSError as error:
            raise OutputLost(error) from error


class _Messages(io.FileIO):
    """Standard error; a failed write is dropped."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def repair() -> None:
    """Make file descriptors 0 to 2 valid and replace `sys.stdout` and `sys.stderr` by the streams described above.

    A descriptor that is closed at the start is opened on /dev/null: the next file opened would get its number, and
    messages of libraries would be written into that file.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Messages(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, before: TextIO | None) -> io.TextIOWrapper:
    """A text stream over `raw` with the encoding of the one it replaces; what it cannot encode is escaped."""
    encoding = getattr(before, "encoding", None) or "utf-8"
    lines = raw.isatty() or raw.fileno() == 2
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)


def last_words(message: str, code: int) -> int:
    """Print the last message of a command on standard error and empty standard output; the exit code.

    Output that cannot be written any more is thrown away here, because the interpreter would try again at its end and
    answer with exit code 120.
    """
    from quantkit.cli.terminal import say

    try:
        sys.stdout.flush()
    except (OutputLost, OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
    if message:
        say(message, err=True)
    return code
