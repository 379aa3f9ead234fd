"""Which estimate of a layer's damage predicts best what mixed models really lose.

    python -m quantkit.bench.quality.sensitivity --work DIR --json FILE

Mixed models are drawn at random: the share of each scheme differs between them, and so does which group gets it. Each
is quantized whole, by the recipe's algorithm behind the quantized layers before, and its KL to the original is measured
on windows of 512 tokens of the embedded evaluation text. Every estimator adds up the damages of the groups, which it
knows from the calibration text alone. Said of each: the rank correlation and the correlation of logarithms with the
measured KL, both with a standard error from leaving out one model at a time, and by what factor predictions scatter
around their best common scale.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantkit import assets
from quantkit.allocation.damage import GroupRecord, damages
from quantkit.allocation.explicit import explicit_recipe
from quantkit.bench.machine import machine
from quantkit.bench.quality.fisher import fisher_damages
from quantkit.bench.quality.windows import Compared, mean
from quantkit.checkpoint.load import load
from quantkit.files import write_json
from quantkit.pipeline.in_memory import quantize_in_memory
from quantkit.pipeline.progress import Silent
from quantkit.pipeline.quantize import prepared
from quantkit.pipeline.sensitivity import Asked, measure
from quantkit.validation import search_space

SCHEMA = "quantkit-bench-sensitivity/1"
CHOICES = [
    {"bits": 2, "group_size": 64, "symmetric": False},
    {"bits": 3, "group_size": 64},
    {"bits": 4, "group_size": 64},
    {"bits": 6, "group_size": 64},
]
NAMES = ("W2", "W3", "W4", "W6")


def run_all(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, estimate, draw, and compare on one model."""
    target = {"bits_per_weight": 4.0, "sensitivity": "kl", "choices": CHOICES}
    calibration = {"samples": arguments.samples, "sequence_length": 512}
    recipe = {
        "weights": {"algorithm": arguments.algorithm, "group_size": 64},
        "target": target,
        "calibration": calibration,
    }
    run = prepared(recipe, path, arguments.work / path.name, (), "cpu", None, Silent())
    space = search_space(run.recipe, run.plan, run.source.headers)
    records: list[GroupRecord] = []
    every = tuple(range(len(CHOICES)))
    begin = time.perf_counter()
    with torch.no_grad():
        measure(run, [Asked(group, every) for group in space.groups], arguments.measured, records.extend)
    seconds = time.perf_counter() - begin
    by_name = {record.name: record for record in records}
    estimates = estimators([by_name[group.name] for group in space.groups])
    if not any(group.experts for group in space.groups):
        model: Any = load(path, device="cpu")
        estimates["fisher"] = fisher_damages(run, model, space.groups, arguments.measured)
        del model
    compared, rng = Compared(path, arguments.windows), random.Random(0)
    measured: list[dict[str, Any]] = []
    predicted = {name: list[float]() for name in estimates}
    for _ in range(arguments.models):
        weights = [rng.random() ** 2 for _ in CHOICES]
        chosen = [rng.choices(every, weights)[0] for _ in space.groups]
        model = quantize_in_memory(explicit_recipe(run.recipe, run.plan, space, chosen), path, device="cpu")
        kl = mean(compared(model)[0])
        measured.append({"kl": kl, "bits_per_weight": space.bits_per_weight(chosen), "chosen": chosen})
        for name, each in estimates.items():
            predicted[name].append(sum(damage[number] for damage, number in zip(each, chosen, strict=True)))
        print(f"{measured[-1]['bits_per_weight']:.3f} bits: KL {kl[0]:.4f} ± {kl[1]:.4f}", flush=True)
    values = [each["kl"][0] for each in measured]
    return {
        "model": path.name,
        "groups": len(space.groups),
        "seconds_to_measure_all": seconds,
        "estimators": {name: _judged(each, values) for name, each in predicted.items()},
        "models": measured,
        "predicted": predicted,
    }


def estimators(records: Sequence[GroupRecord]) -> dict[str, list[list[float]]]:
    """Damages by estimator, from records in which every scheme is an anchor."""
    found = {name: damages(records, name) for name in ("error", "relative", "kl")}
    for number, name in enumerate(NAMES):
        kept = [
            replace(
                record, kl={number: record.kl[number]}, anchor_errors={number: record.anchor_errors[number]}
            )
            for record in records
        ]
        found[f"scaled from {name}"] = damages(kept, "scaled")
    ends = (0, len(NAMES) - 2)
    two = [
        replace(
            record,
            kl={n: record.kl[n] for n in ends},
            anchor_errors={n: record.anchor_errors[n] for n in ends},
        )
        for record in records
    ]
    return found | {"scaled from W2 and W4": damages(two, "scaled")}


def _judged(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, Any]:
    """Correlations with their jackknife errors, and the scatter: exp of the spread of log(measured / predicted)."""
    x, y = torch.tensor(predicted, dtype=torch.float64), torch.tensor(measured, dtype=torch.float64)
    ratio = (y / x).log()
    return {
        "rank_correlation": _jackknife(lambda a, b: _pearson(_ranks(a), _ranks(b)), x, y),
        "log_correlation": _jackknife(lambda a, b: _pearson(a.log(), b.log()), x, y),
        "scatter": math.exp(float(ratio.std())),
        "scale": math.exp(float(ratio.mean())),
    }


def _jackknife(
    statistic: Callable[[torch.Tensor, torch.Tensor], float], x: torch.Tensor, y: torch.Tensor
) -> list[float]:
    """[value, standard error]."""
    n = len(x)
    without = [torch.arange(n) != left for left in range(n)]
    each = torch.tensor([statistic(x[some], y[some]) for some in without], dtype=torch.float64)
    return [statistic(x, y), float(((n - 1) * each.var(correction=0)).sqrt())]


def _ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


def _pearson(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def markdown(row: dict[str, Any]) -> str:
    """One model's estimators, the best first."""
    lines = [
        row["model"],
        "| estimator | rank correlation | correlation of logarithms | scatter |",
        "|---|---|---|---|",
    ]
    for name, each in sorted(row["estimators"].items(), key=lambda one: one[1]["scatter"]):
        cells = [
            f"{value:.3f} ± {error:.3f}"
            for value, error in (each["rank_correlation"], each["log_correlation"])
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | x {each['scatter']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="estimators of damage beside the measured KL of mixed models"
    )
    parser.add_argument(
        "--model", type=Path, action="append", help="folder; repeatable; default: both embedded models"
    )
    parser.add_argument("--algorithm", default="gptq")
    parser.add_argument("--models", type=int, default=24, help="mixed models to draw")
    parser.add_argument("--measured", type=int, default=16, help="calibration windows that KL is measured on")
    parser.add_argument("--windows", type=int, default=24, help="of the evaluation text")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keys = ("algorithm", "models", "measured", "windows", "samples")
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": machine(),
        "settings": {key: getattr(arguments, key) for key in keys},
        "choices": CHOICES,
        "results": [],
    }
    for path in arguments.model or [assets.default_model(), assets.mixture_model()]:
        report["results"].append(run_all(path, arguments))
        print(markdown(report["results"][-1]), flush=True)
        if arguments.json:
            write_json(arguments.json, report)


if __name__ == "__main__":
    main()
