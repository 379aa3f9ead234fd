"""Peak anonymous memory of the whole `quantize` process against the size of the checkpoint.

    python -m quantkit.bench.models.memory --work DIR --json FILE

A synthetic Llama of 24 layers (quantkit.bench.synthetic) is quantized by RTN, by GPTQ without the options that only
cost time, by GPTQ, and by GPTQ with re-target, each in a separate process whose RssAnon is polled every 10 ms. Peaks
are given as shares of the 24-layer checkpoint, whatever the depth. Limits: 28 %, 45 % and 60 %, and the peak of the
whole run at most 1.05 times that of its first half. `--layers` and `--runs` select a part.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.bench.machine import machine
from quantkit.bench.synthetic import make
from quantkit.checkpoint.stream_files import FOLDER
from quantkit.files import write_json

FULL_DEPTH = 24
CALIBRATION = ["calibration.samples=16", "calibration.sequence_length=512"]
PLAIN = [f"weights.algorithm.{o}" for o in ("retarget=0.0", "refine=0", "range=minmax")]
RUNS: dict[str, tuple[str, list[str], float]] = {
    "rtn": ("w4a16-rtn", [], 0.28),
    "gptq-plain": ("w4a16-gptq", [*CALIBRATION, *PLAIN], 0.45),
    "gptq": ("w4a16-gptq", [*CALIBRATION, "weights.algorithm.retarget=0.0"], 0.45),
    "gptq-retarget": ("w4a16-gptq", [*CALIBRATION, "weights.algorithm.retarget=1.0"], 0.60),
}


def peak_anonymous(command: list[str], output: Path) -> tuple[list[int], float]:
    """(peak RssAnon in bytes after each finished block and at the end, seconds); RuntimeError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    status, journal = Path(f"/proc/{process.pid}/status"), output / FOLDER / "journal.jsonl"
    peak = 0
    peaks: list[int] = []
    while process.poll() is None:
        try:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        except OSError:
            break
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        with contextlib.suppress(OSError):
            if journal.read_bytes().count(b"\n") - 1 > len(peaks):  # the first line is not a block
                peaks.append(peak)
        time.sleep(0.01)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command} failed: {errors[-2000:]}")
    return [*peaks, peak], time.perf_counter() - start


def full_size(model: Path) -> int:
    """Bytes of the 24-layer checkpoint, from the shards of a shallower one (one per block, one for the rest)."""
    sizes = [f.stat().st_size for f in sorted(model.glob("*.safetensors"))]
    return FULL_DEPTH * sizes[0] + sizes[-1]


def measure(work: Path, depths: Sequence[int], runs: list[str]) -> dict[str, Any]:
    """One row per run and depth."""
    rows = []
    for layers in depths:
        model = make(work / f"llama-{layers}", layers)
        size = full_size(model)
        for name in runs:
            recipe, overrides, limit = RUNS[name]
            out = work / f"out-{name}-{layers}"
            command = [sys.executable, "-m", "quantkit", "quantize", recipe, "--model", str(model)]
            command += ["--output", str(out), "--no-eval", *(f"--set={o}" for o in overrides)]
            peaks, seconds = peak_anonymous(command, out)
            peak = peaks[-1]
            shutil.rmtree(out)
            rows.append(
                {
                    "run": name,
                    "layers": layers,
                    "checkpoint_bytes_at_24_layers": size,
                    "peak_anonymous_bytes": peak,
                    "peak_after_block": peaks[:layers],
                    "over_first_half": peak / peaks[layers // 2 - 1] if layers > 1 else 1.0,
                    "share": peak / size,
                    "limit": limit,
                    "seconds": seconds,
                }
            )
            print(
                f"{name:14} {layers} layers: {peak / 2**20:.0f} MiB, {peak / size:.1%} of 24 layers",
                flush=True,
            )
        shutil.rmtree(model)
    return {"schema": "quantkit-memory/2", "machine": machine(), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder with 6 GB free")
    parser.add_argument("--layers", type=int, nargs="+", default=[24])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.work, arguments.layers, arguments.runs)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
