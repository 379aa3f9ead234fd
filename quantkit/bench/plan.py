"""What `quantkit plan` predicts beside what a run measures: time by phase, peak memory, size and disk.

    python -m quantkit.bench.plan --work DIR --json FILE
    python -m quantkit.bench.plan --work DIR --models bookworm-8m --recipes w4a16-rtn w4a16-gptq
    python -m quantkit.bench.plan --work DIR --published          # plan alone, on configs of 70B and 235B

The machine is measured before every run, as its speed drifts (`--keep-rates` takes what is kept). Each run is a process
of its own, without the closing evaluation; its time is the process's, its peak that of its resident memory. The model
`1.1b` is random, of the shape of the usual 1.1B Llama (`quantkit.bench.synthetic`), with 4 blocks unless `--layers`
says otherwise: blocks cost the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from quantkit import assets
from quantkit.bench.machine import machine
from quantkit.bench.synthetic import SHAPES, make
from quantkit.checkpoint.manifest import read_facts
from quantkit.files import write_json

SCHEMA = "quantkit-plan-measured/1"
MODELS = {"bookworm-8m": assets.default_model, "bookworm-moe-6m": assets.mixture_model}
LARGE = "1.1b"
RECIPES = ("w4a16-rtn", "w4a16-gptq", "w4a16-awq-gptq")
LESS_TEXT = ["calibration.samples=32"]  # of the large model, so that all of it ends within half an hour
ROUNDS = 5
WITHIN = {"seconds": 0.35, "memory": 0.20}  # of what is measured, so far may a prediction be off


def quantkit(*arguments: str) -> tuple[float, str]:
    """Run the command in a fresh process: (seconds, standard output); RuntimeError if it fails."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "quantkit", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return time.perf_counter() - begin, done.stdout


def compared(
    name: str, model: Path, recipe: str, overrides: list[str], work: Path, again: bool
) -> dict[str, Any]:
    """One run beside its prediction. again: measure the machine before."""
    options = ["--model", str(model), *(f"--set={each}" for each in overrides)]
    if again:
        quantkit("plan", recipe, *options, "--measure", "--json", "-")
    planning, text = quantkit("plan", recipe, *options, "--json", "-")
    planned, output = json.loads(text), work / f"out-{name}-{recipe}"
    shutil.rmtree(output, ignore_errors=True)
    seconds, _ = quantkit(
        "quantize", recipe, *options, "--output", str(output), "--no-eval", "--device", "cpu"
    )
    facts = read_facts(output)
    size = sum(file.stat().st_size for file in output.iterdir())
    shutil.rmtree(output)
    prediction, expected = planned["prediction"], planned["time"]
    row: dict[str, Any] = {
        "model": name,
        "recipe": recipe,
        "overrides": overrides,
        "plan_seconds": planning,
        "seconds": {"predicted": expected["total"], "measured": seconds},
        "phases": {
            phase: {"predicted": expected["phases"].get(phase, 0.0), "measured": measured}
            for phase, measured in facts.seconds.items()
            if phase != "total"
        },
        "memory": {"predicted": prediction["memory"], "measured": facts.peak_bytes["quantize"]},
        "output": {"predicted": prediction["output"], "measured": size},
    }
    for what in ("seconds", "memory", "output"):
        row[what]["ratio"] = row[what]["predicted"] / row[what]["measured"]
    for what, share in WITHIN.items():
        row[what]["within"] = abs(row[what]["ratio"] - 1) <= share
    return row


def published(work: Path) -> list[dict[str, Any]]:
    """The seconds of `plan` alone for configs whose headers a script has made (tests/bench/headers.py), in rounds."""
    rows = []
    for folder in sorted(path for path in work.iterdir() if (path / "config.json").is_file()):
        command = ("plan", "w4a16-gptq", "--model", str(folder), "--hardware", "h100", "--json", "-")
        rounds = [quantkit(*command) for _ in range(ROUNDS)]
        planned = json.loads(rounds[0][1])
        rows.append(
            {
                "model": folder.name,
                "seconds": median(seconds for seconds, _ in rounds),
                "rounds": [seconds for seconds, _ in rounds],
                "tensors": sum(part["tensors"] for part in planned["parts"]),
                "weights": sum(part["weights"] for part in planned["parts"]),
                "output": planned["prediction"]["output"],
            }
        )
    return rows


def told(row: dict[str, Any]) -> str:
    """One line of a run."""
    seconds, memory = row["seconds"], row["memory"]
    return (
        f"{row['model']:16} {row['recipe']:16} time {seconds['predicted']:8.1f} s predicted, "
        f"{seconds['measured']:8.1f} s measured ({seconds['ratio']:.2f}); memory {memory['predicted'] / 1e6:7.0f} MB, "
        f"{memory['measured'] / 1e6:7.0f} MB ({memory['ratio']:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder with 6 GB free")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, LARGE], default=[*MODELS, LARGE])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--layers", type=int, default=4, help="blocks of the 1.1b model")
    parser.add_argument("--keep-rates", action="store_true", help="do not measure the machine again")
    parser.add_argument("--published", action="store_true", help="plan the folders in --work, run nothing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"schema": SCHEMA, "machine": machine(), "within": WITHIN}
    if arguments.published:
        result["plans"] = published(arguments.work)
        for row in result["plans"]:
            print(
                f"{row['model']:16} {row['tensors']:6} tensors, {row['weights'] / 1e9:.1f}B: {row['seconds']:.2f} s"
            )
    else:
        result["rows"] = []
        for name in arguments.models:
            large = name == LARGE
            model = (
                make(arguments.work / LARGE, arguments.layers, shape=SHAPES[LARGE])
                if large
                else MODELS[name]()
            )
            for recipe in arguments.recipes:
                overrides = LESS_TEXT if large and recipe != "w4a16-rtn" else []
                again = not arguments.keep_rates
                result["rows"].append(compared(name, model, recipe, overrides, arguments.work, again))
                print(told(result["rows"][-1]), flush=True)
            if large:
                shutil.rmtree(model)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
