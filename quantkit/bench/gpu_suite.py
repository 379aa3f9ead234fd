"""Everything that needs a CUDA device, in one command.

    python -m quantkit.bench.gpu_suite --work DIR --json docs/benchmarks/gpu.json

First the tests marked `gpu`; then the embedded model is quantized on the device and on the CPU by the same recipe, and
both are evaluated there. Exits 1 if a test fails, or if the two differ by more than their standard errors allow.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from quantkit.bench.machine import machine
from quantkit.checkpoint.shards import write_json
from quantkit.pipeline import quantize

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
        for n in RECIPES
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    status = tests()
    rows = compare(arguments.work)
    where = machine() | {"gpu": torch.cuda.get_device_name()}
    if arguments.json:
        write_json(
            arguments.json, {"schema": "quantkit-gpu/1", "machine": where, "tests": status, "rows": rows}
        )
    sys.exit(status or not agree(rows))


if __name__ == "__main__":
    main()
