"""Everything that needs a CUDA device, in one command.

    python -m quantkit.bench.gpu_suite --work DIR --json docs/benchmarks/gpu.json [--steps tests tune bench compare]

tests: those marked `gpu`, the Triton kernels against fp64 among them. tune: a table of tile sizes for this chip. bench:
`quantkit bench --kernels --device cuda`. compare: the embedded model is quantized on the device and on the CPU by the
same recipe, and both are evaluated there. Each step takes less than ten minutes and can be run alone. Exits 1 if a
test fails, or if the two models differ by more than their standard errors allow.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from quantkit.bench.machine import machine
from quantkit.checkpoint.shards import write_json
from quantkit.pipeline import quantize

STEPS = ("tests", "tune", "bench", "compare")
RECIPES = ("w4a16-rtn", "w4a16-gptq", "w4a16-awq")


def tests() -> int:
    """Exit status of the GPU tests."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], check=False
    ).returncode


def compare(work: Path) -> list[dict[str, Any]]:
    """The same recipes on CUDA and CPU, with their evaluations."""
    rows = []
    for recipe in RECIPES:
        for device in ("cuda", "cpu"):
            report = quantize(recipe, output=work / f"{recipe}-{device}", device=device).report
            rows.append({"recipe": recipe, "device": device} | report)
    return rows


def agree(rows: list[dict[str, Any]]) -> bool:
    """Whether KL on both devices is the same within three standard errors."""
    found = {(r["recipe"], r["device"]): r["evaluation"] for r in rows}
    return all(
        abs(found[n, "cuda"]["kl_mean"] - found[n, "cpu"]["kl_mean"])
        <= 3 * (found[n, "cuda"]["kl_mean_se"] + found[n, "cpu"]["kl_mean_se"])
        for n in {name for name, _ in found}
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    steps, arguments.work = arguments.steps, arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    status = tests() if "tests" in steps else None
    if "tune" in steps:
        table = arguments.work / "triton-table.json"
        subprocess.run(
            [sys.executable, "-m", "quantkit_kernels.triton.tune", "--output", str(table)], check=True
        )
        os.environ["QUANTKIT_TRITON_TABLE"] = str(table)
    timed = arguments.work / "kernels.json"
    if "bench" in steps:
        verb = ["bench", "--kernels", "--device", "cuda", "--m", "1,16,64,256,2048", "--json", str(timed)]
        subprocess.run([sys.executable, "-m", "quantkit", *verb], check=True)
    rows = compare(arguments.work) if "compare" in steps else []
    if arguments.json:
        report = {
            "schema": "quantkit-gpu/1",
            "machine": machine() | {"gpu": torch.cuda.get_device_name()},
            "tests": status,
            "kernels": json.loads(timed.read_text()) if "bench" in steps else None,
            "rows": rows,
        }
        write_json(arguments.json, report)
    sys.exit(bool(status) or not agree(rows))


if __name__ == "__main__":
    main()
