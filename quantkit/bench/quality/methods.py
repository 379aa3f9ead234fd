"""Compare the quantization methods at equal bits on the embedded model.

    python -m quantkit.bench.quality.methods --work DIR --json docs/benchmarks/methods.json
    python -m quantkit.bench.quality.results                      # writes docs/results.md from what was measured

Each row is one complete run of `quantkit quantize`: calibrate on 128 windows of 512 tokens, write and verify the packed
checkpoint, load it again, and evaluate the packed weights in fp32. The evaluation uses windows of 512 tokens of the
embedded evaluation text: 120 for perplexity and the paired difference of NLL, and the first 40 of these for
KL(original || quantized) and top-1 flips, the tokens whose most likely next token changes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import quantkit_eval
import torch
from quantkit_eval.cache import Cache

from quantkit import assets
from quantkit.bench.machine import commit, machine
from quantkit.checkpoint.load import load
from quantkit.files import write_json
from quantkit.layers.kv_cache import cache_of
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.models.tokenizer import open_tokenizer
from quantkit.pipeline.quantize import quantize

CONTEXT, WINDOWS, KL_WINDOWS = 512, 120, 40
BITS = ((4, 128), (3, 128), (2, 64))
PLAIN = {"name": "gptq", "range": "minmax", "refine": 0, "retarget": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"weights": {"algorithm": {"name": "rtn", "range": "minmax"}}},
    "AWQ": {"weights": {"algorithm": {"name": "rtn", "range": "minmax"}}, "transforms": ["awq"]},
    "GPTQ": {"weights": {"algorithm": "gptq"}},
    "AWQ + GPTQ": {"weights": {"algorithm": "gptq"}, "transforms": ["awq"]},
}
LEVERS: dict[str, dict[str, Any]] = {
    "GPTQ, plain": {"weights": {"algorithm": PLAIN}},
    "+ sweeps": {"weights": {"algorithm": PLAIN | {"refine": 4}}},
    "+ range search": {"weights": {"algorithm": PLAIN | {"refine": 4, "range": "mse"}}},
    "+ re-target, no range search": {"weights": {"algorithm": PLAIN | {"refine": 4, "retarget": 1.0}}},
}
LEVER_BITS = ((4, 128, True), (3, 128, True), (2, 64, False))


def runs() -> list[tuple[str, str, int, int, bool, dict[str, Any]]]:
    """The rows to measure: (table, method, bits, group, symmetric, recipe)."""
    rows = [
        ("methods", name, bits, group, symmetric, recipe)
        for bits, group in BITS
        for symmetric in (True, False)
        for name, recipe in METHODS.items()
    ]
    return rows + [
        ("levers", name, bits, group, symmetric, recipe)
        for bits, group, symmetric in LEVER_BITS
        for name, recipe in LEVERS.items()
    ]


class Measured:
    """One model and its evaluation in fp32: called with a recipe, quantizes it and returns the numbers of a row."""

    def __init__(self, work: Path, model: Path) -> None:
        self.work, self.model = work, model
        self.original = load(model, device="cpu")
        self.tokenizer = open_tokenizer(model)
        digest = Source(read_checkpoint(model)).digest()
        self.cache = Cache(work / "baseline", 1 << 32, digest)

    def __call__(self, recipe: str | dict[str, Any], label: str) -> dict[str, Any]:
        """label: names the folder of the checkpoint inside the scratch folder."""
        result = quantize(recipe, str(self.model), self.work / label, evaluate=False, device="cpu")
        seconds = result.report.cpu_seconds
        return {
            "commit": commit(),
            "bits_per_weight": result.report.size.linear_bits_per_weight or None,  # None: as they were
            "cpu_seconds": seconds["calibrate_quantize"] + seconds.get("search", 0.0),
            "evaluation": self.evaluated(result.output),
        }

    def evaluated(self, folder: Path, against: Path | None = None) -> dict[str, Any]:
        """The evaluation of a packed checkpoint against the original model, or against another checkpoint."""
        packed = load(folder, device="cpu")
        report: dict[str, Any] = quantkit_eval.evaluate(
            packed,
            self.tokenizer,
            assets.evaluation_text(),
            baseline=load(against, device="cpu") if against else self.original,
            context=CONTEXT,
            max_tokens=CONTEXT * WINDOWS,
            kl_windows=KL_WINDOWS,
            baseline_cache=None if against else self.cache,
            cache=cache_of(packed),
        ).to_json()
        report.pop("text")
        return report


def finished(cache: Path) -> list[dict[str, Any]]:
    """The rows that an earlier run has left in a file of JSON lines."""
    return [json.loads(line) for line in cache.read_text().splitlines()] if cache.exists() else []


def keep(cache: Path, row: dict[str, Any], done: list[dict[str, Any]]) -> None:
    """Add a row to the file and to the list."""
    done.append(row)
    with cache.open("a") as file:
        file.write(json.dumps(row) + "\n")


def measure(work: Path, cache: Path, share: tuple[int, int]) -> list[dict[str, Any]]:
    """Measure all rows that `cache` (JSON lines) does not hold yet. share: (i, n) takes every n-th row from row i."""
    done = finished(cache)
    known = {(r["table"], r["method"], r["bits"], r["symmetric"]) for r in done}
    measured = Measured(work, assets.default_model())
    for table, name, bits, group, symmetric, recipe in runs()[share[0] :: share[1]]:
        if (table, name, bits, symmetric) in known:
            continue
        weights = recipe["weights"] | {"bits": bits, "group_size": group, "symmetric": symmetric}
        label = f"{table}-{name}-{bits}-{symmetric}".replace(" ", "").replace("+", "")
        row = {
            "table": table,
            "method": name,
            "bits": bits,
            "group": group,
            "symmetric": symmetric,
        }
        row |= measured(recipe | {"weights": weights}, label)
        keep(cache, row, done)
        print(_line(row), flush=True)
    return done


def plus_minus(fit: dict[str, Any]) -> str:
    return f"{fit['perplexity']:.3f} ± {fit['perplexity_se']:.2f}"


def _line(row: dict[str, Any]) -> str:
    e = row["evaluation"]
    q = e["quantized"]
    scheme = f"W{row['bits']} g{row['group']} {'sym' if row['symmetric'] else 'asym'}"
    return (
        f"| {scheme} | {row['method']} | {row['bits_per_weight']:.2f} | {plus_minus(q)} "
        f"| {e['delta_nll']:+.4f} ± {e['delta_nll_se']:.4f} | {1e3 * e['kl_mean']:.2f} ± {1e3 * e['kl_mean_se']:.2f} "
        f"| {1 - e['top1_agreement']:.1%} | {row['cpu_seconds']:.0f} |"
    )


def markdown(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The first part of docs/results.md."""
    head = (
        "| scheme | method | bits/weight | perplexity | paired ΔNLL | KL x 1e-3 | top-1 flips | CPU-s |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    base = rows[0]["evaluation"]["original"]
    first = f"| bf16 | original, run in fp32 | 16.00 | {plus_minus(base)} | | | | |\n"
    order = [(t, n, b, s) for t, n, b, _, s, _ in runs()]
    rows = sorted(rows, key=lambda r: order.index((r["table"], r["method"], r["bits"], r["symmetric"])))
    tables = {t: "\n".join(_line(r) for r in rows if r["table"] == t) for t in ("methods", "levers")}
    return (
        "# Results\n\n"
        f"{' '.join((__doc__ or '').split(chr(10) * 2)[2].split())}\n\n"
        f"Made by `python -m quantkit.bench.quality.methods` on {where['cpu']}, torch {where['torch']}, "
        f"{where['threads']} thread(s), commit {where['commit']}, {where['date'][:10]}. ± is one standard error over "
        "windows. CPU-s is the user and system time of calibrating and quantizing.\n\n"
        f"## Methods\n\n{head}{first}{tables['methods']}\n\n"
        "## What each option of GPTQ contributes\n\n"
        "All rows use activation order, static groups and `true_sequential`. The first row of a scheme has no sweeps, "
        "range search or re-targeting; the second adds sweeps, and the last two add one more option to the second.\n\n"
        f"{head}{tables['levers']}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="scratch folder; a stopped run continues there"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--share", type=int, nargs=2, default=(0, 1), help="i n: every n-th row, for n processes"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = measure(arguments.work, arguments.work / "rows.jsonl", tuple(arguments.share))
    where = machine() | {"threads": arguments.threads}
    if arguments.json:
        write_json(arguments.json, {"schema": "quantkit-methods/1", "machine": where, "rows": rows})


if __name__ == "__main__":
    main()
