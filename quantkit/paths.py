"""Paths that a user wrote, in a recipe or on the command line: an error instead of an exception of the system."""

from __future__ import annotations

import errno
from pathlib import Path

from quantkit.errors import QuantkitError

_ABSENT = (errno.ENOENT, errno.ENOTDIR)


def user_path(text: str | Path, error: type[QuantkitError]) -> Path:
    """The path with `~` expanded; whether it exists is left to the caller.

    `error` when no such path can exist or be looked at: a NUL character, a name that is too long, `~` of an unknown
    user, a loop of links, a folder that may not be read.
    """
    shown = _shown(text)
    try:
        path = Path(text).expanduser()
        path.stat()
    except RuntimeError:
        raise error(f"{shown}: `~` names no user of this machine; write the path out") from None
    except ValueError:
        raise error(f"{shown} cannot be a path: it holds a NUL character or is not valid text") from None
    except OSError as problem:
        if problem.errno not in _ABSENT:
            raise error(f"{shown} cannot be read: {problem.strerror or problem}") from None
    return path


def weights_path(text: str | Path, error: type[QuantkitError], advice: str = "rename it") -> Path:
    """`user_path` of a folder of weights; `error` also for a path that is not UTF-8, which safetensors cannot open."""
    path = user_path(text, error)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise error(
            f"the path {_shown(text)} is not UTF-8, which safetensors cannot open; {advice}"
        ) from None
    return path


def _shown(text: str | Path) -> str:
    return repr(str(text) if len(str(text)) <= 200 else f"{str(text)[:200]}...")
