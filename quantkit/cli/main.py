"""The `quantkit` command: it runs one command line and turns whatever goes wrong into one message and an exit code.

0 done, 1 the run or its verification failed, 2 the input is wrong, 130 interrupted by Ctrl-C.

Only the standard library is imported at the top, so that Ctrl-C, a closed stream and the settings of the OpenMP
runtime are taken care of before anything slow or any thread is started.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

from quantkit.cli import environment, streams

_interrupts: list[int] = []


def main() -> None:
    """Entry point of the `quantkit` process: settings that belong to a whole process, the command, the exit code."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
        streams.repair()
        environment.prepare(os.environ, terminal=sys.stderr.isatty())
        code = run()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
    except KeyboardInterrupt:
        code = 130
        sys.stderr.write("interrupted\n")
    sys.exit(code)


def _interrupt(number: int, _frame: Any) -> None:
    _interrupts.append(number)
    raise KeyboardInterrupt


def _say_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line on standard error: where in our code it arose tells the user nothing."""
    from quantkit.cli.terminal import say

    say(f"warning: {message}", err=True)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. Every error is printed as one message, without a traceback."""
    try:
        from quantkit.cli.verbs import cli

        with warnings.catch_warnings():
            warnings.showwarning = _say_warning
            code = cli.main(args=arguments, prog_name="quantkit", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BaseException as error:
        # Ctrl-C while a C extension is imported arrives as whatever error that import makes of it.
        if isinstance(error, KeyboardInterrupt) or _interrupts:
            return streams.last_words("" if os.environ.get("RANK", "0") != "0" else "interrupted", 130)
        from quantkit.cli.failures import describe

        return streams.last_words(*describe(error))
