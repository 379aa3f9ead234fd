"""Every error quantkit raises on purpose.

    QuantkitError
    ├── UserError               the input is wrong; exit code 2, no traceback
    │   ├── RecipeError         a recipe or an override
    │   ├── ModelError          a checkpoint that is missing, corrupt, unsupported or does not fit the recipe
    │   ├── DataError           calibration or evaluation text
    │   ├── OutputError         the output folder: taken by another run, full, not writable
    │   └── BackendError        a kernel backend that was asked for by name and is missing
    └── RunError                the run itself failed; exit code 1
        ├── NumericalError      non-finite or collapsed layers, no positive-definite Hessian at any damping
        ├── OutOfMemory         this machine or device has not enough memory
        ├── ProcessLost         another process of the run has died, failed or does not answer
        └── VerificationError   what was written is not what was computed

Each message says what, got, and what to do. `memory_named` turns the many errors by which libraries report that memory
ran out into `OutOfMemory`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

_MEMORY = re.compile(
    r"out of memory|not enough memory|can(?:'t|not) allocate memory|bad_alloc|unable to mmap|"
    r"failed to map segment|memory allocation of \d+ bytes failed",
    re.IGNORECASE,
)


class QuantkitError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class UserError(QuantkitError):
    """The input is wrong; nothing was computed from it."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe, a rule or a `--set` override."""


class ModelError(UserError):
    """A checkpoint that is missing, corrupt, unsupported, or does not fit the recipe."""


class DataError(UserError):
    """Calibration or evaluation text."""


class OutputError(UserError):
    """The output folder: taken by another run, full, or not writable."""


class BackendError(UserError):
    """A kernel backend was asked for by name and is not available."""


class RunError(QuantkitError):
    """The run failed although its input was right."""


class NumericalError(RunError):
    """A layer became non-finite or collapsed."""


class VerificationError(RunError):
    """The files do not hold what was computed."""


class ProcessLost(RunError):
    """Another process of the run has died, failed or does not answer.

    told: whether the first process says why, so that the others need not.
    """

    def __init__(self, message: str, told: bool = True) -> None:
        super().__init__(message)
        self.told = told


class OutOfMemory(RunError):
    """This machine or device has not enough memory for what was asked."""

    @classmethod
    def of(cls, error: BaseException) -> OutOfMemory:
        """The error to raise for a library's `error`."""
        detail = " ".join(str(error).split()) or type(error).__name__
        return cls(
            f"out of memory: {detail[:200]}; close other programs or use a machine with more memory; quantizing takes "
            "less with fewer calibration.samples or a smaller calibration.sequence_length, evaluating with --no-eval "
            "or a smaller --context"
        )


def memory_ran_out(error: BaseException | None) -> bool:
    """Whether `error`, or one that it was raised from or while handling, says that memory ran out."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError | OutOfMemory) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if not isinstance(error, QuantkitError) and _MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def kept_traceback(error: BaseException) -> str | None:
    """Write the traceback of an unforeseen error to a new temporary file; its name, None if it cannot be written."""
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(prefix="quantkit-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
        return name
    return None


def why(error: BaseException) -> str:
    """Why something failed, in one line; for what nobody foresaw, with the file that holds its traceback."""
    if memory_ran_out(error) and not isinstance(error, OutOfMemory):
        error = OutOfMemory.of(error)
    said = " ".join(str(error).split()) or type(error).__name__
    if hasattr(error, "exit_code") or isinstance(
        error, OSError
    ):  # raised on purpose, here or in quantkit_eval
        return said
    if not isinstance(error, Exception):
        return "interrupted" if isinstance(error, KeyboardInterrupt) else said
    name = kept_traceback(error)
    return f"unexpected {type(error).__name__}: {said}" + (f" (traceback in {name})" if name else "")


@contextmanager
def memory_named() -> Iterator[None]:
    """Raise `OutOfMemory` instead of a library's error that means it; also a decorator."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not memory_ran_out(error):
            raise
        raise OutOfMemory.of(error) from error
