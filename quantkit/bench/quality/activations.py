"""What quantized activations, number formats and KV caches cost: shipped recipes, and with outlier channels.

    python -m quantkit.bench.quality.activations --work DIR --json docs/benchmarks/activations.json
    python -m quantkit.bench.quality.results                      # writes docs/results.md from what was measured

Runs and evaluation are those of the tables above; a quantized KV cache is evaluated as decoding sees it. The model with
outlier channels (`quantkit.bench.quality.outliers`) computes exactly what the embedded model does, with inputs of which
a few channels are 32 or 64 times larger. One scale for all inputs of a layer then leaves next to nothing of the other
channels, until SmoothQuant moves the range of the large ones into the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantkit import assets
from quantkit.bench.machine import machine
from quantkit.bench.quality.methods import Measured, finished, keep, plus_minus
from quantkit.bench.quality.outliers import inject
from quantkit.files import write_json
from quantkit.recipe.recipe import load_recipe, parse_recipe
from quantkit.scheme import Scheme

CACHES = ("kv-int8", "kv-fp8", "kv-int4")
SHIPPED = (
    "w8a8-int8-smoothquant",
    "w8a8-int8-dynamic",
    "w8a8-fp8-dynamic",
    "w8a8-fp8-static",
    "w8a8-fp8-block",
    "w4a8-gptq",
    "nvfp4a16-gptq",
    "mxfp4a16-rtn",
    "w4a16-smoothquant-plus",
    "w4a16-gptq-kv-fp8",
    *CACHES,
)


class Case(NamedTuple):
    """One row. model: "embedded" or "outliers". recipe: a shipped one's name or a mapping."""

    model: str
    name: str
    recipe: str | dict[str, Any]

    @property
    def scheme(self) -> str:
        """What is quantized, in words: linears, KV cache."""
        parsed = load_recipe(self.recipe) if isinstance(self.recipe, str) else parse_recipe(self.recipe)
        weights, inputs = parsed.weights, parsed.inputs
        said: list[Any] = []
        if weights is not None:
            said.append(Scheme(weights.scheme.weights, None if inputs is None else inputs.grid))
        if parsed.kv_cache is not None:
            said.append(parsed.kv_cache.scheme)
        return ", ".join(map(str, said))


def _rounded(preset: str, *transforms: str) -> dict[str, Any]:
    return {"weights": {"preset": preset, "algorithm": "rtn"}, "transforms": list(transforms)}


def _fp4(preset: str, algorithm: str | dict[str, Any]) -> dict[str, Any]:
    return {"weights": {"preset": preset, "algorithm": algorithm}}


ABSMAX = {"name": "rtn", "range": "minmax"}  # compressed-tensors' own rounding

CASES = (
    *(Case("embedded", name, name) for name in SHIPPED),
    Case("embedded", "NVFP4A16, abs-max rounding", _fp4("NVFP4A16", ABSMAX)),
    Case("embedded", "MXFP4A16, abs-max rounding", _fp4("MXFP4A16", ABSMAX)),
    Case("embedded", "MXFP4A16, GPTQ", _fp4("MXFP4A16", "gptq")),
    Case("outliers", "RTN, inputs static per tensor", _rounded("W8A8_STATIC")),
    Case("outliers", "SmoothQuant, inputs static per tensor", _rounded("W8A8_STATIC", "smoothquant")),
    Case("outliers", "RTN, inputs per token", _rounded("W8A8")),
    Case("outliers", "SmoothQuant, inputs per token", _rounded("W8A8", "smoothquant")),
    Case("outliers", "w8a8-int8-smoothquant", "w8a8-int8-smoothquant"),
    *(Case("outliers", name, name) for name in ("w4a16-smoothquant-plus", *CACHES)),
)


def measure(work: Path, cache: Path) -> list[dict[str, Any]]:
    """Measure all cases that `cache` (JSON lines) does not hold yet."""
    done = finished(cache)
    known = {(row["model"], row["name"]) for row in done}
    models = {"embedded": assets.default_model(), "outliers": work / "outliers"}
    if not models["outliers"].exists():
        inject(models["outliers"], assets.default_model())
    measured = {name: Measured(work, path) for name, path in models.items()}
    for number, case in enumerate(CASES):
        if (case.model, case.name) not in known:
            row = {"model": case.model, "name": case.name, "scheme": case.scheme}
            keep(cache, row | measured[case.model](case.recipe, f"{number}-{case.model}"), done)
            print(_line(done[-1]), flush=True)
    return done


def _line(row: dict[str, Any]) -> str:
    e = row["evaluation"]
    q, base = e["quantized"], e["original"]
    bits = "as it was" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
    return (
        f"| {row['name']} | {row['scheme']} | {bits} | {plus_minus(q)} "
        f"| {q['perplexity'] / base['perplexity'] - 1:+.2%} | {e['delta_nll']:+.4f} ± {e['delta_nll_se']:.4f} "
        f"| {1e3 * e['kl_mean']:.2f} ± {1e3 * e['kl_mean_se']:.2f} | {1 - e['top1_agreement']:.1%} "
        f"| {row['cpu_seconds']:.0f} |"
    )


def section(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The part of docs/results.md that these rows make."""
    head = (
        "| recipe | scheme | bits/weight | perplexity | over fp32 | paired ΔNLL | KL x 1e-3 | top-1 flips | CPU-s |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    order = [(case.model, case.name) for case in CASES]
    rows = sorted(rows, key=lambda row: order.index((row["model"], row["name"])))
    tables = {m: "\n".join(_line(r) for r in rows if r["model"] == m) for m in ("embedded", "outliers")}
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return (
        "## Activations, number formats and KV caches\n\n"
        f"{' '.join((__doc__ or '').split(chr(10) * 2)[2].split())}\n\n"
        f"Made by `python -m quantkit.bench.quality.activations` on {where['cpu']}, torch {where['torch']}, "
        f"{where['threads']} thread(s), commits {commits}, {where['date'][:10]}.\n\n"
        f"The embedded model:\n\n{head}{tables['embedded']}\n\n"
        f"The model with outlier channels:\n\n{head}{tables['outliers']}\n"
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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = measure(arguments.work, arguments.work / "rows.jsonl")
    if arguments.json:
        where = machine() | {"threads": arguments.threads}
        write_json(arguments.json, {"schema": "quantkit-activations/1", "machine": where, "rows": rows})


if __name__ == "__main__":
    main()
