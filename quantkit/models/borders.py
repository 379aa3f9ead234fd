"""The border to other libraries: what they raise about a user's file becomes one of our errors.

transformers, tokenizers and safetensors raise almost anything for a damaged file: ZeroDivisionError, AssertionError,
KeyError, validators of their own, and panics of Rust code, which are no `Exception`. Listing types has let some
through, so every one is translated, except what is not about the file: our own errors, lack of memory, Ctrl-C. `quiet`
keeps what they print on the way off the screen.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from logging import WARNING

from quantkit.errors import ModelError, QuantkitError

_turn = threading.Lock()
_quiet: list[tuple[int, bool]] = []  # the settings that each open `quiet` has found
_LENGTH = 300  # characters of a foreign message that are worth showing
_NO_MEMORY = ("not enough memory", "can't allocate memory", "cannot allocate memory", "out of memory")


@contextmanager
def foreign_errors(what: str, advice: str = "", error: type[QuantkitError] = ModelError) -> Iterator[None]:
    """Raise `error("<what>: <the library's reason>; <advice>")` for whatever the library inside raises."""
    try:
        yield
    except QuantkitError:
        raise
    except BaseException as problem:
        rust_panic = type(problem).__name__ == "PanicException"
        if not (rust_panic or isinstance(problem, Exception)) or is_memory(problem):
            raise
        raise error(f"{what}: {reason(problem)}{advice and '; '}{advice}") from problem


@contextmanager
def quiet(bars: bool | None = None) -> Iterator[None]:
    """Hold back what transformers logs about our own calls, and its progress bars; afterwards all is as it was.

    Our errors say what its warnings say. bars: whether bars may be drawn; None: where standard error is a terminal. A
    user who asked transformers for more than warnings keeps it. Threads share the settings, which are the user's again
    when the last one is done.
    """
    from transformers.utils import logging

    if bars is None:
        bars = sys.stderr.isatty()
    with _turn:
        found = logging.get_verbosity(), logging.is_progress_bar_enabled()
        _quiet.append(_quiet[0] if _quiet else found)
        if found[0] == WARNING:
            logging.set_verbosity_error()
        if not bars:
            logging.disable_progress_bar()
    try:
        yield
    finally:
        with _turn:
            verbosity, drawn = _quiet.pop()
            if not _quiet:
                logging.set_verbosity(verbosity)
                if drawn:
                    logging.enable_progress_bar()


def reason(problem: BaseException) -> str:
    """A foreign error in one line, with its type where the text alone says little ("'x'", "7")."""
    text = " ".join(str(problem).split())
    text = re.split(r"[.;,] (You can inspect|Please pass the argument `trust_remote)", text)[
        0
    ]  # never our advice
    if len(text) > _LENGTH:
        text = text[:_LENGTH] + " ..."
    kind = type(problem).__name__
    telling = len(text.split()) > 2 and kind not in ("KeyError", "AttributeError", "TypeError")
    return text if telling else f"{kind}: {text}" if text else kind


def is_memory(problem: BaseException) -> bool:
    """Whether an error of any library means that memory ran out."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    return isinstance(problem, RuntimeError | OSError) and any(
        text in str(problem).lower() for text in _NO_MEMORY
    )
