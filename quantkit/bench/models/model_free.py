"""Memory and time of a run without a model class, beside a copy of the same files.

    python -m quantkit.bench.models.model_free --work /tmp/model-free --json FILE

A synthetic Llama of 24 layers (quantkit.bench.synthetic, 2.4 GB) is quantized to FP8 with `model_free: true`, in a
separate process whose RssAnon is polled every 10 ms, and its files are copied: read, written and synced, a piece at a
time. Both are done in turn, `--rounds` times, and the medians are compared. Limits: memory at most 1.2 times the
largest tensor in fp32 plus 450 MB, time at most twice that of the copy. The time of the command includes starting
Python.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from quantkit.bench.machine import machine
from quantkit.bench.models.memory import peak_anonymous
from quantkit.bench.synthetic import make
from quantkit.files import write_json
from quantkit.models.tensors import read_tensors

PIECE = 16 << 20
BESIDE, OF_LARGEST, OF_COPY = 450_000_000, 1.2, 2.0  # the limits
SCHEMES = {
    "fp8-dynamic": ["weights.preset=FP8_DYNAMIC"],
    "fp8-block": ["weights.preset=FP8_BLOCK"],
}
RECIPE = "model_free: true\nweights: {preset: FP8_DYNAMIC, algorithm: {name: rtn, range: minmax}}\n"


def copy(model: Path, output: Path) -> float:
    """Seconds of a durable copy of all files of a folder."""
    start = time.perf_counter()
    output.mkdir()
    for file in sorted(model.iterdir()):
        with file.open("rb", buffering=0) as source, (output / file.name).open("wb", buffering=0) as target:
            while piece := source.read(PIECE):
                target.write(piece)
            os.fsync(target.fileno())
    return time.perf_counter() - start


def measure(work: Path, layers: int, rounds: int, schemes: list[str]) -> dict[str, Any]:
    """One row per scheme."""
    model = make(work / "llama", layers)
    largest = max(4 * math.prod(info.shape) for info in read_tensors(model)[1].values())
    limit = OF_LARGEST * largest + BESIDE
    recipe = work / "recipe.yaml"
    recipe.write_text(RECIPE)
    rows = []
    for scheme in schemes:
        copied, taken, peak = [], [], 0
        for _ in range(rounds):
            copied.append(copy(model, work / "copy"))
            shutil.rmtree(work / "copy")
            command = [sys.executable, "-m", "quantkit", "quantize", str(recipe), "--model", str(model)]
            command += ["--output", str(work / "out"), "--no-eval", *(f"--set={o}" for o in SCHEMES[scheme])]
            peaks, seconds = peak_anonymous(command, work / "out")
            shutil.rmtree(work / "out")
            taken.append(seconds)
            peak = max(peak, *peaks)
        row = {
            "scheme": scheme,
            "layers": layers,
            "checkpoint_bytes": sum(file.stat().st_size for file in model.iterdir()),
            "largest_tensor_fp32_bytes": largest,
            "peak_anonymous_bytes": peak,
            "memory_limit_bytes": limit,
            "copy_seconds": copied,
            "seconds": taken,
            "over_copy": statistics.median(taken) / statistics.median(copied),
            "time_limit": OF_COPY,
        }
        rows.append(row)
        print(
            f"{scheme}: {peak / 1e6:.0f} MB of {limit / 1e6:.0f} allowed; {statistics.median(taken):.1f} s, copy "
            f"{statistics.median(copied):.1f} s, ratio {row['over_copy']:.2f} of {OF_COPY} allowed",
            flush=True,
        )
    shutil.rmtree(model)
    return {"schema": "quantkit-model-free/1", "machine": machine(), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder with 8 GB free")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.work, arguments.layers, arguments.rounds, arguments.schemes)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
