"""What went wrong, in words: any exception -> (message, exit code)."""

from __future__ import annotations

import io
import os

import click

from quantkit.cli.streams import OutputLost
from quantkit.device import launch
from quantkit.errors import OutOfMemory, QuantkitError, kept_traceback, memory_ran_out


def describe(error: BaseException) -> tuple[str, int]:
    """The message for the user and the exit code. What nobody foresaw is named as a bug, its traceback in a file.

    Of several processes only the first speaks, of errors of the others too, unless it is the one that was lost.
    """
    message, code = _described(error)
    told = isinstance(error, click.ClickException | click.Abort) or getattr(error, "told", False)
    return ("" if launch().rank and told else message), code


def _described(error: BaseException) -> tuple[str, int]:
    if isinstance(error, click.Abort):
        return "interrupted", 130
    if isinstance(error, click.exceptions.Exit):
        return "", error.exit_code
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, click.ClickException):
        shown = io.StringIO()
        error.show(file=shown)
        return shown.getvalue().rstrip("\n"), error.exit_code
    if isinstance(error, OutputLost):
        return ("" if error.reader_gone else f"quantkit: {error}"), 1
    if memory_ran_out(error) and not isinstance(error, OutOfMemory):
        error = OutOfMemory.of(error)
    if isinstance(error, QuantkitError) or _from_evaluation(error):
        return f"quantkit: {error}", getattr(error, "exit_code", 1)
    if isinstance(error, OSError) and error.filename is not None:
        name = os.fsdecode(error.filename) if not isinstance(error.filename, int) else str(error.filename)
        return f"quantkit: {name}: {error.strerror or error}", 2
    return _unforeseen(error), 1


def _from_evaluation(error: BaseException) -> bool:
    """quantkit_eval does not import quantkit's errors; its own have an exit code, too."""
    return type(error).__module__.partition(".")[0] == "quantkit_eval"


def _unforeseen(error: BaseException) -> str:
    """A bug of quantkit: its type and message in one line, and the file that holds the traceback."""
    message = f"quantkit: unexpected {type(error).__name__}: {error}"
    if name := kept_traceback(error):
        message += f"\nThis is a bug in quantkit. Please report it with the traceback in {name}"
    return message
