"""What a bounded spin at OpenMP's barriers costs on an idle machine, and what it gains on a busy one.

    python -m quantkit.bench.models.waiting --work DIR --json waiting.json
    python -m quantkit.bench.models.waiting --work DIR --busy

Decode of a packed 1.1B Llama, in a process per setting, because the runtime reads its settings once: with the runtime's
defaults, with the settings that the `quantkit` command makes (`quantkit.device.SPIN`) and with OMP_WAIT_POLICY=passive.
The processes take turns within a round; ratios are medians of the ratios within rounds.
--busy keeps every core busy with one other process meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from quantkit.device import SPIN, THREAD_SETTINGS, WAIT_SETTINGS

POLICIES: dict[str, dict[str, str]] = {
    "defaults of the runtime": {},
    "quantkit": SPIN,
    "passive": {"OMP_WAIT_POLICY": "passive"},
}


def environment_of(settings: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """This process's environment with exactly these settings of how threads wait, and so many threads."""
    kept = {name: value for name, value in os.environ.items() if name not in WAIT_SETTINGS}
    if threads:
        kept = {name: value for name, value in kept.items() if name not in THREAD_SETTINGS}
        kept["OMP_NUM_THREADS"] = str(threads)
    return kept | {"PYTHONPATH": os.pathsep.join(sys.path)} | dict(settings)


class Worker:
    """A process with these settings that has loaded the model and measures whenever it is asked to."""

    def __init__(
        self, checkpoint: Path, settings: Mapping[str, str], threads: int | None, prompt: int, new: int
    ) -> None:
        command = [sys.executable, "-m", "quantkit.bench.models.waiting", "--measure", str(checkpoint)]
        self.process = subprocess.Popen(
            [*command, "--prompt", str(prompt), "--new", str(new)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment_of(settings, threads),
        )

    def measure(self) -> dict[str, float]:
        """{"decode", "prefill": tokens/s} of the native path."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, float] = json.loads(line)
                return found
        raise RuntimeError(f"the measuring process ended with exit code {self.process.wait()}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def answer(checkpoint: Path, prompt: int, new: int) -> None:
    """Be the process of a `Worker`: measure once for every line on standard input, after one round to warm up."""
    from quantkit.bench.models.decode import WAYS, measure, open_model, runner

    way = WAYS["native W4A16"]
    model = open_model(checkpoint, way)
    run = runner(model, way)
    measure(run, model.config.vocab_size, prompt, new)
    for _ in sys.stdin:
        print(json.dumps(measure(run, model.config.vocab_size, prompt, new)), flush=True)


@contextmanager
def busy_cores() -> Iterator[None]:
    """One process per core that does nothing but compute."""
    burn = "while True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(
    checkpoint: Path,
    policies: Mapping[str, Mapping[str, str]],
    rounds: int,
    threads: int | None,
    prompt: int,
    new: int,
) -> dict[str, Any]:
    """The report of schema "quantkit-waiting/1": speeds per policy, and how many times faster than the defaults."""
    from quantkit.bench.machine import machine, where
    from quantkit.bench.rounds import interleave, ratios

    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(checkpoint, settings, threads, prompt, new))
            for name, settings in policies.items()
        }
        measured = interleave({name: worker.measure for name, worker in workers.items()}, rounds)
    report = {
        "schema": "quantkit-waiting/1",
        "machine": machine() | where("cpu") | {"threads": threads or where("cpu")["threads"]},
        "policies": {name: dict(settings) for name, settings in policies.items()},
        "prompt_tokens": prompt,
        "new_tokens": new,
        **measured,
    }
    first = next(iter(policies))
    report["times_faster_than_defaults"] = {
        name: ratios(report, name, [first]).get(first) for name in policies if name != first
    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("out/bench"), help="where the models are made and kept"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--spin", nargs="*", type=int, default=[], help="also these values of GOMP_SPINCOUNT")
    parser.add_argument("--busy", action="store_true", help="keep every core busy with another process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        answer(options.measure, options.prompt, options.new)
        return
    from quantkit.bench.models.decode import models
    from quantkit.files import write_json

    checkpoint = models(options.work)["packed"]
    policies = POLICIES | {f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in options.spin}
    arguments = (checkpoint, policies, options.rounds, options.threads, options.prompt, options.new)
    if options.busy:
        with busy_cores():
            report = run(*arguments)
    else:
        report = run(*arguments)
    report["busy"] = options.busy
    for name, faster in report["times_faster_than_defaults"].items():
        print(
            f"{name:24} decode {faster['decode']:.3f}, prefill {faster['prefill']:.3f} times the default's speed"
        )
    if options.json:
        write_json(options.json, report)
    print(json.dumps(report["times_faster_than_defaults"]))


if __name__ == "__main__":
    main()
