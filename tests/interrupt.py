"""Stop a quantization at a chosen moment, from outside the package.

A moment is the n-th of the system calls that change the output folder: the middle of every write, every fsync,
rename and unlink, in the order in which one run makes them. `python interrupt.py` is a server that imports
everything once and forks for each job, so that a killed run costs a fork and not an interpreter.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

Tick = Callable[[str, str], None]
SOURCE_DIGEST = (
    "quantkit.pipeline.publish.source_digest"  # left out: the package may be edited during a test run
)


class _TornWrites:
    """A file whose every write stops half way for a tick."""

    def __init__(self, file: Any, tick: Tick) -> None:
        self._file, self._tick = file, tick

    def write(self, data: Any) -> None:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._tick("write", Path(self._file.name).name)
        self._file.write(data[half:])

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_TornWrites":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


@contextmanager
def watching(tick: Tick) -> Iterator[None]:
    """Call tick(what, file name) at every moment: write, fsync, rename (before), renamed (after), unlink,
    and the begin of the evaluation.
    """
    import quantkit_eval

    from quantkit import files
    from quantkit.checkpoint import journal

    fsync, replace, unlink = os.fsync, os.replace, os.unlink
    evaluate = quantkit_eval.evaluate

    def opened(path: Any, mode: str = "r", **options: Any) -> Any:
        file = open(path, mode, **options)  # noqa: SIM115  (the caller closes it)
        writes = mode[0] in "wa" and Path(path).name != "lock"
        return _TornWrites(file, tick) if writes else file

    def synced(descriptor: int) -> None:
        tick("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        tick("rename", Path(target).name)
        replace(source, target)
        tick("renamed", Path(target).name)

    def evaluated(*args: Any, **options: Any) -> Any:
        tick("evaluate", "")
        return evaluate(*args, **options)

    def unlinked(path: Any, **options: Any) -> None:
        tick("unlink", Path(path).name)
        unlink(path, **options)

    with (
        patch.object(files, "open", opened, create=True),
        patch.object(journal, "open", opened, create=True),
        patch("os.fsync", synced),
        patch("os.replace", renamed),
        patch("os.unlink", unlinked),
        patch("quantkit_eval.evaluate", evaluated),
    ):
        yield


class Server:
    """Runs `quantkit.quantize(**arguments)` in forks of one warm process; arguments must be JSON-able."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, moment: int, arguments: dict[str, Any], by: signal.Signals = signal.SIGKILL) -> int:
        """Send the signal to the run at `moment`; returns its process id, or 0 if it ended before."""
        self._process.stdin.write(json.dumps([moment, int(by), arguments]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _quantize_until(moment: int, by: int, arguments: dict[str, Any]) -> None:
    import quantkit

    count = 0

    def tick(what: str, name: str) -> None:
        nonlocal count
        if count == moment:
            os.kill(os.getpid(), by)
        count += 1

    with watching(tick), patch(SOURCE_DIGEST, str):
        quantkit.quantize(**arguments)


def _serve() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import quantkit.checkpoint.load
    import quantkit.pipeline  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            os.dup2(2, 1)
            try:
                _quantize_until(*job)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, os.WUNTRACED)
        print(child if os.WIFSIGNALED(status) or os.WIFSTOPPED(status) else 0, flush=True)


if __name__ == "__main__":
    _serve()
