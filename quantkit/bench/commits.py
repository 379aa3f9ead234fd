"""Compare the speed of two commits: generation, and whole quantization runs.

    python -m quantkit.bench.commits --before OTHER/bin/python --work DIR --json commits.json

--before is the interpreter of an environment in which an older commit is installed; the newer commit is the one that
runs this. Decode and prefill are of a packed 1.1B Llama (W4 g128, head included); quantization is of the embedded
model, without its evaluation. Everything is measured in a process of its own, since two commits cannot share one. The
processes take turns within a round. A ratio is the median of the ratios within rounds, above 1 where the newer commit
is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.bench.rounds import Measured, interleave, ratio

# Only what both commits have: quantkit.load and quantkit.generate. The first call warms up, the best of two counts.
GENERATE = """
import json, sys, time
import torch, quantkit
model = quantkit.load(sys.argv[1], dtype=torch.bfloat16, compute=sys.argv[2])
prompt, new = int(sys.argv[3]), int(sys.argv[4])
ids = torch.arange(prompt)[None] * 37 % model.config.vocab_size
def speed(ids, new):
    start = time.perf_counter()
    quantkit.generate(model, ids, max_new_tokens=new)
    return (ids.shape[1] if new == 1 else new) / (time.perf_counter() - start)
speed(ids[:, :8], 4)
print(json.dumps({"decode": max(speed(ids[:, :1], new) for _ in "12"), "prefill": max(speed(ids, 1) for _ in "12")}))
"""


def generation(python: str, checkpoint: Path, compute: str, prompt: int, new: int) -> Measured:
    """{"decode", "prefill": tokens/s} with the package of one interpreter."""
    done = _finished([python, "-c", GENERATE, str(checkpoint), compute, str(prompt), str(new)])
    found: Measured = json.loads(done.splitlines()[-1])
    return found


def quantization(python: str, recipe: str) -> Measured:
    """{"runs": whole runs per second} of a recipe on the embedded model."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        _finished([python, "-m", "quantkit", "quantize", recipe, "--no-eval", "--output", f"{folder}/out"])
        return {"runs": 1 / (time.perf_counter() - start)}


def _finished(command: list[str]) -> str:
    """Standard output of a command, run outside this checkout so that the interpreter finds its own package."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=kept)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])}: {done.stderr[-2000:]}")
    return done.stdout


def compare(
    measures: dict[str, Callable[[str], Measured]], before: str, after: str, rounds: int
) -> dict[str, Any]:
    """{name: {"engines": speeds of "before" and "after", "times_faster": {kind: ratio}, ...}} for each measure."""
    found = {}
    for name, measure in measures.items():
        print(name)
        engines = {"before": lambda m=measure: m(before), "after": lambda m=measure: m(after)}
        report = interleave(engines, rounds, unit="per second")
        kinds = report["engines"]["after"]
        found[name] = report | {
            "times_faster": {kind: ratio(report, kind, "after", "before") for kind in kinds}
        }
        print(json.dumps(found[name]["times_faster"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, help="interpreter of the older commit's environment")
    parser.add_argument("--before-commit", default="unknown", help="its name, for the report")
    parser.add_argument("--work", type=Path, required=True, help="where the 1.1B model is made and kept")
    parser.add_argument("--recipes", nargs="*", default=["w4a16-rtn", "w4a16-gptq"])
    parser.add_argument("--computes", nargs="*", default=["float", "int8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from quantkit.bench.machine import machine, where
    from quantkit.bench.models.decode import models
    from quantkit.files import write_json

    measures: dict[str, Callable[[str], Measured]] = {}
    if options.computes:
        packed = models(options.work)["packed"]
        for compute in options.computes:
            measures[f"generate, {compute}"] = partial(
                generation, checkpoint=packed, compute=compute, prompt=options.prompt, new=options.new
            )
    for recipe in options.recipes:
        measures[f"quantize, {recipe}"] = partial(quantization, recipe=recipe)
    report = {
        "schema": "quantkit-commits/1",
        "machine": machine() | where("cpu"),
        "before": options.before_commit,
        "prompt_tokens": options.prompt,
        "new_tokens": options.new,
        "measures": compare(measures, options.before, sys.executable, options.rounds),
    }
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
