"""Run quantkit in several processes that share one run, as torchrun starts them, with gloo.

`python processes.py` is a server that imports everything once and forks for each process. What a test cannot do from
outside (kill one at a moment, fail in one) is a part of the job.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).parent


class Server:
    """Starts processes that share runs; a job is JSON-able, see `_run`."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
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

    def start(self, *jobs: dict[str, Any]) -> list[tuple[int, str]]:
        """(exit code, standard error) of one process per job, when all have ended."""
        self._process.stdin.write(json.dumps(jobs) + "\n")
        self._process.stdin.flush()
        return [tuple(each) for each in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _run(job: dict[str, Any]) -> int:
    """{"quantize": [keyword arguments of several runs]} or {"command": [arguments of the command line]}.

    kill: the number of the block at whose calibration this process kills itself. fail: at which it raises instead.
    """
    from interrupt import SOURCE_DIGEST

    import quantkit
    from quantkit.calibration.block_run import BlockRun
    from quantkit.cli import main
    from quantkit.errors import NumericalError

    collect = BlockRun.collect

    def watched(run: BlockRun, *args: Any) -> Any:
        if run.index == job.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if run.index == job.get("fail"):
            raise NumericalError("a test wants it")
        return collect(run, *args)

    with (
        patch.object(BlockRun, "collect", watched),
        patch(SOURCE_DIGEST, str),
        patch(
            "quantkit.calibration.walk.CHUNK_ELEMENTS", 1
        ),  # a window at a time, as one process in the tests
    ):
        for arguments in job.get("quantize", ()):
            quantkit.quantize(**arguments)
        return main.run(job["command"]) if "command" in job else 0


def _forked(job: dict[str, Any], place: dict[str, str], errors: int) -> int:
    """The process id of a child that runs the job at its place among the others."""
    if child := os.fork():
        return child
    code = 1
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.environ |= place
    try:
        code = _run(job)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import quantkit.checkpoint.load
    import quantkit.cli.verbs
    import quantkit.pipeline.quantize  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        jobs = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        size = str(len(jobs))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": size}
        said = [tempfile.TemporaryFile("w+") for _ in jobs]  # noqa: SIM115  (they end with the turn)
        children = [
            _forked(
                job,
                shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": size},
                said[rank].fileno(),
            )
            for rank, job in enumerate(jobs)
        ]
        codes = dict(os.wait() for _ in children)
        for file in said:
            file.seek(0)
        ended = [
            (os.waitstatus_to_exitcode(codes[child]), file.read())
            for child, file in zip(children, said, strict=True)
        ]
        print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    _serve()
