"""Compare the time left that a run shows after each block with the time that the rest then took, per recipe.

    python -m quantkit.bench.quality.estimates --json estimates.json
    python -m quantkit.bench.quality.estimates --model DIR --recipes w4a16-rtn --eval-tokens 2048 --json big.json

Each recipe is run whole with its closing evaluation, in a process of its own, on one thread, without results kept from
earlier runs. Seconds are of the wall clock. With --cpu they are CPU-seconds of the process, for a machine that has
other work; other work still makes them vary, through shared caches and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantkit.bench.machine import machine
from quantkit.files import write_json
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.progress import Silent
from quantkit.pipeline.quantize import quantize

RECIPES = ("w4a16-rtn", "w4a16-awq", "w4a16-gptq")


class Recorder(Silent):
    """A display that keeps the time and the estimate of each report of a finished block."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.told: list[tuple[str, float, float | None]] = []

    def block(self, index: int, name: str, note: str = "", left: float | None = None) -> None:
        self.told.append((name, self.now(), left))


def follow(
    recipe: str,
    model: str | None,
    output: str,
    overrides: Sequence[str] = (),
    eval_tokens: int | None = None,
    cpu: bool = False,
) -> dict[str, Any]:
    """Run one recipe in this process.

    Returns {"recipe", "seconds" of the run, "eval_tokens" evaluated, "after": [row, ..]}, a row for every block and one
    for what lies outside the blocks: "part", "estimate" and "truth" of the seconds left, "error_percent" (null without
    an estimate).
    """
    before = Clock.now
    Clock.now = staticmethod(time.process_time if cpu else time.perf_counter)
    try:
        recorder, begin = Recorder(Clock.now), Clock.now()
        result = quantize(recipe, model, output, overrides, "cpu", progress=recorder, eval_tokens=eval_tokens)
        end = Clock.now()
    finally:
        Clock.now = staticmethod(before)
    if result.failed:
        raise RuntimeError(result.failed)
    evaluation = result.report.evaluation
    return {
        "recipe": recipe,
        "seconds": end - begin,
        "eval_tokens": evaluation and evaluation.tokens,
        "after": [_row(part, left, end - at) for part, at, left in recorder.told],
    }


def _row(part: str, estimate: float | None, truth: float) -> dict[str, Any]:
    error = None if estimate is None else 100 * (estimate / truth - 1)
    return {"part": part, "estimate": estimate, "truth": truth, "error_percent": error}


def measure(
    recipes: Sequence[str],
    model: str | None,
    overrides: Sequence[str] = (),
    eval_tokens: int | None = None,
    cpu: bool = False,
) -> list[dict[str, Any]]:
    """What `follow` gives for every recipe, each in a process of its own on one thread."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = os.environ | single | {"QUANTKIT_CACHE_GB": "0", "PYTHONPATH": path}
    rows = []
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            call = json.dumps([recipe, model, f"{folder}/out", list(overrides), eval_tokens, cpu])
            command = [sys.executable, "-m", "quantkit.bench.quality.estimates", "--one", call]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{recipe} failed: {done.stderr[-2000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One recipe: the estimate after the first block, and the largest error after any part."""
    first = row["after"][0]
    if first["estimate"] is None:
        return f"{row['recipe']:16} no estimate after the first block"
    largest = max((r["error_percent"] for r in row["after"] if r["estimate"] is not None), key=abs)
    return (
        f"{row['recipe']:16} after the first block: estimate {first['estimate']:.1f} s, truth {first['truth']:.1f} s, "
        f"error {first['error_percent']:+.1f} %; largest error {largest:+.1f} %; {row['eval_tokens']} tokens evaluated"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a checkpoint folder (default: the embedded model)")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--eval-tokens", type=int, help="as of `quantkit quantize`")
    parser.add_argument("--cpu", action="store_true", help="CPU-seconds of the process, not wall seconds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(follow(*json.loads(options.one))))
        return
    rows = measure(options.recipes, options.model, options.overrides, options.eval_tokens, options.cpu)
    if options.json:
        report = {
            "schema": "quantkit-estimates/1",
            "machine": machine(),
            "clock": "cpu" if options.cpu else "wall",
            "threads": 1,
            "model": Path(options.model).name if options.model else None,
            "overrides": options.overrides,
            "eval_tokens": options.eval_tokens,
            "recipes": rows,
        }
        write_json(options.json, report)


if __name__ == "__main__":
    main()
