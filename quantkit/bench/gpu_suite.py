"""Run the tests and benchmarks that need a CUDA device, in one command.

    python -m quantkit.bench.gpu_suite --work DIR [--steps tests decode] [--seconds 570] [--json FILE]

The steps: `tests` runs the tests marked `gpu`, among them the Triton kernels against fp64, in several processes because
most of the time is compilation. `decode` times whole steps of a 32-layer Llama-3-8B, bf16 and packed, with CUDA graphs
and without. `tune` writes a table of tile sizes for this chip, which later steps use. `bench` is `quantkit bench
--products --device cuda`, W8A8 in int8 and FP8 among them. `caches` times attention over INT8 and FP8 caches against
PyTorch's over bf16. `gptq` times the solving of weights. `compare` quantizes the embedded model by one recipe on the
device and on the CPU, and evaluates both results on the device.

If a command may take only ten minutes, run `tests decode`, then `tune`, then `bench caches gptq compare`, with one DIR.
Each step writes DIR/STEP.json, which also says if the time ran out, and the report collects the steps found in DIR.
Nothing is downloaded. The exit code is 1 if a step fails or runs out of time, or if the two quantized models differ by
more than their standard errors allow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from quantkit.bench.machine import machine
from quantkit.files import write_json
from quantkit.pipeline.quantize import quantize

RECIPES = ("w4a16-rtn", "w4a16-gptq", "w4a16-awq")
TESTS = ("tests",)
PROCESSES = 8
TABLE = "triton-table.json"
_PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]


def tests(work: Path, deadline: float) -> dict[str, Any]:
    """Run the tests marked `gpu`, divided among processes."""
    listing = subprocess.run(
        [*_PYTEST, "--collect-only", *TESTS], capture_output=True, text=True, check=False
    )
    names = [line for line in listing.stdout.splitlines() if "::" in line]
    if not names:
        return {"ok": False, "output": (listing.stdout + listing.stderr)[-4000:]}
    hands = [names[i::PROCESSES] for i in range(min(PROCESSES, len(names)))]
    files = [work / f"tests-{i}.xml" for i in range(len(hands))]
    logs = [work / f"tests-{i}.log" for i in range(len(hands))]
    running = []
    for hand, file, log in zip(hands, files, logs, strict=True):
        file.unlink(missing_ok=True)
        with log.open("w") as out:
            command = [*_PYTEST, f"--junitxml={file}", *hand]
            running.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
    late = []
    for i, process in enumerate(running):
        try:
            process.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            late += hands[i]
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in (
        suite for file in files if file.exists() for suite in ElementTree.parse(file).iter("testsuite")
    ):
        counts = {name: value + int(suite.get(name, 0)) for name, value in counts.items()}
    failed = [
        line for log in logs for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))
    ]
    passed = counts["tests"] == len(names) and not (counts["failures"] or counts["errors"])
    return {"ok": passed, "collected": len(names)} | counts | {"failed": failed, "late": late}


def _child(work: Path, deadline: float, name: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m ... --json FILE`, stop it at the deadline, and return what it wrote."""
    file = work / f"{name}-report.json"
    file.unlink(missing_ok=True)
    status: int | str
    command = [sys.executable, "-m", *arguments, str(file)]
    try:
        status = subprocess.run(command, check=False, timeout=max(deadline - time.monotonic(), 1)).returncode
    except subprocess.TimeoutExpired:
        status = "out of time"
    report = json.loads(file.read_text()) if file.exists() else None
    return {"ok": status == 0 and report is not None, "status": status, "report": report}


def decode(work: Path, deadline: float) -> dict[str, Any]:
    """Time whole decode steps with CUDA graphs and without."""
    return _child(work, deadline, "decode", "quantkit.bench.models.gpu_decode", "--json")


def tune(work: Path, deadline: float) -> dict[str, Any]:
    """Write a table of tile sizes for as many shapes as the time allows."""
    seconds = str(max(int((deadline - time.monotonic()) * 0.85), 30))
    done = _child(work, deadline, "tune", "quantkit_kernels.triton.tune", "--seconds", seconds, "--output")
    if done["report"]:
        write_json(work / TABLE, done["report"])
    return done


def bench(work: Path, deadline: float) -> dict[str, Any]:
    """Time our ops against those of the installed libraries."""
    verb = ("quantkit", "bench", "--products", "--device", "cuda", "--m", "1,16,64,256,2048", "--rounds", "5")
    return _child(work, deadline, "bench", *verb, "--shapes", "llama-3-8b", "--json")


def caches(work: Path, deadline: float) -> dict[str, Any]:
    """Time attention over quantized caches against PyTorch's over bf16."""
    return _child(work, deadline, "caches", "quantkit.bench.kernels.gpu_kv", "--json")


def gptq(work: Path, deadline: float) -> dict[str, Any]:
    """Time GPTQ's column loops as Triton kernels against torch's ops, and experts as one batch."""
    return _child(work, deadline, "gptq", "quantkit.bench.kernels.gptq", "--device", "cuda", "--json")


def compare(work: Path, deadline: float) -> dict[str, Any]:
    """Quantize by the same recipes on CUDA and on the CPU, and evaluate the results."""
    rows: list[dict[str, Any]] = []
    for recipe in RECIPES:
        if time.monotonic() > deadline:
            break
        for device in ("cuda", "cpu"):
            report = quantize(recipe, output=work / f"{recipe}-{device}", device=device).report
            rows.append({"recipe": recipe, "device": device} | report.to_json())
    return {"ok": len(rows) == 2 * len(RECIPES) and agree(rows), "rows": rows}


def agree(rows: list[dict[str, Any]]) -> bool:
    """Whether KL on both devices is the same within three standard errors."""
    found = {(r["recipe"], r["device"]): r["evaluation"] for r in rows}
    return all(
        abs(found[n, "cuda"]["kl_mean"] - found[n, "cpu"]["kl_mean"])
        <= 3 * (found[n, "cuda"]["kl_mean_se"] + found[n, "cpu"]["kl_mean_se"])
        for n in {name for name, _ in found}
    )


STEPS: dict[str, Callable[[Path, float], dict[str, Any]]] = {
    "tests": tests,
    "decode": decode,
    "tune": tune,
    "bench": bench,
    "caches": caches,
    "gptq": gptq,
    "compare": compare,
}


def run(work: Path, steps: list[str], seconds: float) -> dict[str, Any]:
    """Run the steps in order within the remaining time; returns {step: its report} for all reports in `work`."""
    deadline = time.monotonic() + seconds
    for i, name in enumerate(steps):
        if (work / TABLE).exists():
            os.environ["QUANTKIT_TRITON_TABLE"] = str(work / TABLE)
        left = deadline - time.monotonic()
        if left < 5:
            found = {"ok": False, "status": "out of time"}
        else:
            share = time.monotonic() + (left if i == len(steps) - 1 else left * 0.6)
            start = time.monotonic()
            found = STEPS[name](work, share) | {"seconds": round(time.monotonic() - start, 1)}
        write_json(work / f"{name}.json", found)
        print(f"{name}: {'ok' if found['ok'] else 'FAILED'}", flush=True)
    written = [name for name in STEPS if (work / f"{name}.json").exists()]
    return {name: json.loads((work / f"{name}.json").read_text()) for name in written}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--seconds", type=float, default=3000)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    found = run(work, arguments.steps, arguments.seconds)
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    report = {"schema": "quantkit-gpu/2", "machine": machine() | gpu} | found
    write_json(work / "gpu.json", report)
    if arguments.json:
        write_json(arguments.json, report)
    sys.exit(not all(found[step]["ok"] for step in arguments.steps))


if __name__ == "__main__":
    main()
