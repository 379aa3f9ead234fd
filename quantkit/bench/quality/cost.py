"""CPU-seconds of quantizing the embedded model, W4 g128, 128 x 512 tokens, one thread.

    python -m quantkit.bench.quality.cost --work DIR --json FILE [--rival PYTHON]

Every run is a process of its own without evaluation. "quantizing" is user + system time of the phases calibrate,
transform and quantize of quantkit.run.json, without imports, load, write and verification. "process" is all of it, as
the system counts it. PYTHON is the interpreter of an environment that has llm-compressor; its GPTQ and AWQ (AWQ there
rounds to nearest afterwards) then run on the same windows, and "quantizing" is the call of its `oneshot`, which saves
nothing. Each round runs everything once; numbers are medians with their range, a ratio is the median of the ratios
within each round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from quantkit import assets
from quantkit.bench.machine import machine
from quantkit.bench.quality import oneshot
from quantkit.bench.rounds import ratio, spread
from quantkit.calibration.text import token_windows
from quantkit.checkpoint.manifest import read_facts, read_manifest
from quantkit.files import write_json
from quantkit.models.tokenizer import open_tokenizer
from quantkit.recipe.recipe import load_recipe

QUANTIZING = ("calibrate", "transform", "quantize")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Run(NamedTuple):
    """A shipped recipe with overrides, and the rival's method it is compared with."""

    recipe: str
    overrides: tuple[str, ...]
    rival: str


RUNS: dict[str, Run] = {
    "gptq": Run("w4a16-gptq", ("weights.algorithm.retarget=0.0",), "gptq"),
    "gptq-retarget": Run("w4a16-gptq", ("weights.algorithm.retarget=1.0",), "gptq"),
    "awq-gptq": Run("w4a16-awq-gptq", (), "awq"),
}


def rival_name(method: str) -> str:
    return f"llm-compressor {method}"


def cpu_seconds(command: Sequence[str], folder: Path) -> tuple[str, float]:
    """(stdout, user + system seconds) of a command on one thread; RuntimeError if it fails."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": path}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=folder, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {errors.read()[-2000:]}")
        return out.read(), usage.ru_utime + usage.ru_stime


def ours(run: Run, model: Path, work: Path, overrides: Sequence[str], digest: str) -> dict[str, Any]:
    """{"quantizing", "process", "phases"} in CPU-seconds of one `quantkit quantize`."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)  # a finished checkpoint would only be verified
    command = [sys.executable, "-m", "quantkit", "quantize", run.recipe, "--model", str(model)]
    command += ["--output", str(out), "--no-eval", "--device", "cpu"]
    command += [f"--set={o}" for o in (*run.overrides, *overrides)]
    _, process = cpu_seconds(command, work)
    phases = read_facts(out).cpu_seconds
    data = read_manifest(out).identity["data"]
    if data != digest:
        raise RuntimeError(f"{run.recipe} was calibrated on other windows")
    shutil.rmtree(out)
    return {"quantizing": sum(phases.get(p, 0.0) for p in QUANTIZING), "process": process, "phases": phases}


def theirs(rival: str, method: str, model: Path, work: Path, windows: Path) -> dict[str, Any]:
    """{"quantizing", "process", "versions"} of one oneshot call in the rival's environment."""
    command = [rival, "-I", str(Path(oneshot.__file__).resolve()), str(model), str(windows), method]
    said, process = cpu_seconds(command, work)
    found = json.loads(said.splitlines()[-1])
    return {"quantizing": found["cpu_seconds"], "process": process, "versions": found["versions"]}


def interleave(
    engines: Mapping[str, Callable[[], dict[str, Any]]], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """What every engine measured, each once per round."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for number in range(1, rounds + 1):
        for name, run in engines.items():
            found = run()
            seen[name].append(found)
            print(
                f"round {number}  {name:24} quantizing {found['quantizing']:.1f}, process {found['process']:.1f} CPU-s",
                flush=True,
            )
    return seen


def summary(seen: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """{"engines": medians and ranges, "ours_over_rival": medians of the ratios within rounds}."""
    engines: dict[str, Any] = {}
    for name, found in seen.items():
        row = {kind: spread([f[kind] for f in found]) for kind in ("quantizing", "process")}
        if name in RUNS:
            row["phases"] = {p: spread([f["phases"][p] for f in found]) for p in found[0]["phases"]}
        engines[name] = row
    report: dict[str, Any] = {"engines": engines, "ours_over_rival": {}}
    for name, run in RUNS.items():
        other = rival_name(run.rival)
        if name in engines and other in engines:
            kinds = {kind: ratio(report, kind, name, other) for kind in ("quantizing", "process")}
            report["ours_over_rival"][name] = {"rival": other} | kinds
    versions = [f["versions"] for found in seen.values() for f in found if "versions" in f]
    return report | ({"rival_versions": versions[0]} if versions else {})


def measure(
    work: Path,
    runs: Sequence[str] = tuple(RUNS),
    rounds: int = 3,
    rival: str | None = None,
    model: Path | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """The report. overrides: `--set` of every run of ours, after those of RUNS."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model = model or assets.default_model()
    calibration = load_recipe(RUNS[runs[0]].recipe, overrides).calibration
    tokenizer = open_tokenizer(model)
    windows = token_windows(calibration, tokenizer, assets.calibration_text())
    engines: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(ours, RUNS[name], model, work, overrides, windows.digest) for name in runs
    }
    if rival:
        file = work / "windows.json"
        file.write_text(json.dumps(windows.ids.tolist()))
        for method in dict.fromkeys(RUNS[name].rival for name in runs):
            engines[rival_name(method)] = partial(theirs, rival, method, model, work, file)
    count, length = windows.ids.shape
    return {
        "schema": "quantkit-cost/1",
        "machine": machine() | {"threads": 1},
        "windows": count,
        "window_tokens": length,
        "rounds": rounds,
        **summary(interleave(engines, rounds)),
    }


def table(report: Mapping[str, Any]) -> str:
    """As text: CPU-seconds, medians with their range, and ratios."""
    head = f"{'CPU-seconds':24}{'quantizing':>12}{'(range)':>16}{'process':>10}{'(range)':>16}"
    lines = [head + "  ours / rival, quantizing"]
    for name, row in report["engines"].items():
        line = f"{name:24}"
        for kind, width in (("quantizing", 12), ("process", 10)):
            found = row[kind]
            line += f"{found['median']:{width}.1f}{found['min']:9.1f}-{found['max']:<6.1f}"
        over = report["ours_over_rival"].get(name)
        lines.append(line + (f"  {over['quantizing']:.2f} of {over['rival']}" if over else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rival", metavar="PYTHON", help="interpreter that has llm-compressor")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = measure(arguments.work, arguments.runs, arguments.rounds, arguments.rival)
    print(table(report))
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
