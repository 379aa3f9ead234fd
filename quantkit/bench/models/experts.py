"""What quantizing a mixture of experts by GPTQ takes: peak memory against its size and its number of experts, and time.

    python -m quantkit.bench.models.experts --work DIR --json docs/benchmarks/experts.json

Synthetic mixtures of the Qwen3-MoE type (quantkit.bench.synthetic) are quantized with the recipe w4a16-gptq on 16
windows of 512 tokens, each in a process of its own whose RssAnon is polled every 10 ms.

- "share": 2.5 GB in 8 blocks of 64 experts. The peak is at most 35 % of the checkpoint. `--layers` takes fewer blocks;
  the peak is then compared with the size of 8.
- "count": 2 blocks of 8, 32 and 128 experts of one size, of which 2 see each token. The peak does not grow with their
  number: at 128 at most 1.05 times that at 8.
- "time": CPU-seconds per expert, phases calibrate and quantize, of 1 block of 64 experts against a dense Llama whose
  MLPs are as large as one expert and see as many tokens as an expert does on average. Attention is left as it is in
  both. At most 1.2 times. Rounds alternate; the ratio is the median of the ratios within each round.

`--runs` takes some of them. The file keeps the others, and each says with which commit it ran.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.bench.machine import commit, machine
from quantkit.bench.models.memory import peak_anonymous
from quantkit.bench.rounds import spread
from quantkit.bench.synthetic import MIXTURES, Mixture, Shape, make, make_mixture
from quantkit.checkpoint.manifest import read_facts
from quantkit.files import write_json

FULL_DEPTH, COUNTED_DEPTH, DENSE_DEPTH = 8, 2, 8
COUNTS = (8, 32, 128)
WINDOWS, LENGTH = 16, 512
LIMITS = {"share": 0.35, "count": 1.05, "time": 1.2}
PHASES = ("calibrate", "quantize")
WITHOUT_ATTENTION = ('rules=[{match: "*.self_attn.*", skip: true}]',)


def quantized(
    model: Path, work: Path, windows: int = WINDOWS, length: int = LENGTH, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """One run of GPTQ: its peak anonymous memory in bytes, wall seconds, and CPU-seconds of each phase."""
    out = work / f"out-{model.name}"
    command = [sys.executable, "-m", "quantkit", "quantize", "w4a16-gptq", "--model", str(model)]
    command += ["--output", str(out), "--no-eval", "--device", "cpu"]
    settings = [f"calibration.samples={windows}", f"calibration.sequence_length={length}", *overrides]
    peaks, seconds = peak_anonymous([*command, *(f"--set={s}" for s in settings)], out)
    facts = read_facts(out)
    shutil.rmtree(out)
    return {"peak_anonymous_bytes": peaks[-1], "seconds": seconds, "cpu_seconds": facts.cpu_seconds}


def share(work: Path, layers: int = FULL_DEPTH, shape: Mixture = MIXTURES["moe"]) -> dict[str, Any]:
    """The peak against the size of the checkpoint of 8 blocks."""
    model = make_mixture(work / f"moe-{layers}", layers, shape)
    blocks = [f.stat().st_size for f in sorted(model.glob("*.safetensors"))]
    size = FULL_DEPTH * blocks[0] + blocks[-1]
    row = {"layers": layers, "experts": shape.experts, "checkpoint_bytes_at_8_layers": size}
    row |= quantized(model, work)
    shutil.rmtree(model)
    return row | {"share": row["peak_anonymous_bytes"] / size, "limit": LIMITS["share"]}


def count(
    work: Path, counts: Sequence[int] = COUNTS, shape: Mixture = MIXTURES["moe-small"]
) -> dict[str, Any]:
    """Peaks with more and more experts of one size."""
    rows = []
    for experts in counts:
        model = make_mixture(work / f"moe-of-{experts}", COUNTED_DEPTH, shape._replace(experts=experts))
        rows.append({"experts": experts, "layers": COUNTED_DEPTH} | quantized(model, work))
        shutil.rmtree(model)
        print(f"{experts} experts: {rows[-1]['peak_anonymous_bytes'] / 2**20:.0f} MiB", flush=True)
    peaks = [row["peak_anonymous_bytes"] for row in rows]
    return {"rows": rows, "last_over_first": peaks[-1] / peaks[0], "limit": LIMITS["count"]}


def time_per_expert(work: Path, rounds: int = 3, shape: Mixture = MIXTURES["moe"]) -> dict[str, Any]:
    """CPU-seconds per expert beside those per dense MLP of the same shape."""
    mixture = make_mixture(work / "moe-1", 1, shape)
    dense = make(work / "dense", DENSE_DEPTH, shape=Shape(*shape[:5]))
    each = (
        WINDOWS * shape.top // shape.experts
    )  # windows that hold as many tokens as an expert sees on average
    seen: dict[str, list[dict[str, float]]] = {"expert": [], "dense": []}
    for number in range(1, rounds + 1):
        for name, model, windows, units in (
            ("dense", dense, each, DENSE_DEPTH),
            ("expert", mixture, WINDOWS, shape.experts),
        ):
            found = quantized(model, work, windows, overrides=WITHOUT_ATTENTION)["cpu_seconds"]
            row = {phase: found.get(phase, 0.0) / units for phase in PHASES}
            seen[name].append(row | {"both": sum(row.values())})
            print(f"round {number}  {name:8} {seen[name][-1]['both']:.3f} CPU-s", flush=True)
    for model in (mixture, dense):
        shutil.rmtree(model)
    pairs = list(zip(seen["expert"], seen["dense"], strict=True))
    return {
        name: {phase: spread([row[phase] for row in rows]) for phase in (*PHASES, "both")}
        for name, rows in seen.items()
    } | {
        "expert_over_dense": spread([one["both"] / other["both"] for one, other in pairs]),
        "limit": LIMITS["time"],
        "tokens_each": each * LENGTH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder with 4 GB free")
    parser.add_argument("--runs", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--layers", type=int, default=FULL_DEPTH, help="blocks of the run `share`")
    parser.add_argument("--rounds", type=int, default=3, help="of the run `time`")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        report = json.loads(arguments.json.read_text(encoding="utf-8"))
    report |= {"schema": "quantkit-experts/1", "machine": machine()}
    work, made = arguments.work, {"commit": commit()}
    if "share" in arguments.runs:
        report["share"] = share(work, arguments.layers) | made
        print(
            f"peak {report['share']['share']:.1%} of the checkpoint (limit {LIMITS['share']:.0%})", flush=True
        )
    if "count" in arguments.runs:
        report["count"] = count(work) | made
        print(
            f"128 experts over 8: {report['count']['last_over_first']:.3f} (limit {LIMITS['count']})",
            flush=True,
        )
    if "time" in arguments.runs:
        report["time"] = time_per_expert(work, arguments.rounds) | made
        over = report["time"]["expert_over_dense"]["median"]
        print(f"an expert over a dense MLP: {over:.2f} (limit {LIMITS['time']})", flush=True)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
