"""Mixed precision beside one scheme for all layers, at no more bytes; differences paired by window, with their errors.

    python -m quantkit.bench.quality.mixed --work DIR --json docs/benchmarks/mixed.json
    python -m quantkit.bench.quality.mixed --model PATH --work DIR --json FILE

The budget of a size is the bytes of one uniform scheme: W3 in groups of 64, 3.25 bits per weight with its scales, or W2
in groups of 32, 2.5 bits. The mixed model must not take more. Beside that uniform scheme, others that fit into the same
bytes are measured too, as one of them may be better. All run the same algorithm (GPTQ, 128 windows of 512
tokens), are written, loaded again, and compared packed with the original on windows of 512 tokens of the embedded
evaluation text. Smaller KL and NLL are better; a difference of the mixed model to a uniform one is negative if it is
better. FILE is written after every size, and the same command goes on behind those it holds.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantkit import assets
from quantkit.bench.machine import machine
from quantkit.bench.quality.windows import Compared, mean
from quantkit.checkpoint.load import load
from quantkit.files import write_json
from quantkit.pipeline.quantize import quantize

SCHEMA = "quantkit-bench-mixed/1"
# Nominal bits per weight -> uniform schemes (bits, group size, symmetric); the first one sets the budget.
SIZES: dict[str, tuple[tuple[int, int, bool], ...]] = {
    "3.25": ((3, 64, True), (3, 128, True), (3, 128, False), (2, 32, False)),
    "2.5": ((2, 32, True), (2, 64, True), (2, 64, False), (2, 128, False)),
}


def measure(
    path: Path, work: Path, arguments: argparse.Namespace, found: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Add to `found` what one model gives at every size; keep is called after each that was not there."""
    compared = Compared(path, arguments.windows)
    found |= {"model": path.name, "windows": len(compared.ids)}
    sizes = found.setdefault("sizes", [])
    for bits in arguments.bits:
        if all(row["bits_per_weight"] != float(bits) for row in sizes):
            sizes.append(_size(bits, path, work, compared, arguments))
            keep()
            print(markdown(path.name, sizes[-1]), flush=True)


def _begun(file: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The report of an earlier call with the same settings that was cut short, or a new one."""
    if file is not None and file.exists():
        report: dict[str, Any] = json.loads(file.read_text())
        if report["schema"] == SCHEMA and report["settings"] == settings:
            return report
    return {"schema": SCHEMA, "machine": machine(), "settings": settings, "models": []}


def _size(
    bits: str, path: Path, work: Path, compared: Compared, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The uniform schemes of one size, and the mixed model, which may take as many bytes as the first of them."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    row: dict[str, Any] = {"bits_per_weight": float(bits), "uniform": {}}
    for number, group, symmetric in SIZES[bits]:
        name = f"W{number} g{group} {'sym' if symmetric else 'asym'}"
        weights = {"bits": number, "group_size": group, "symmetric": symmetric}
        made, size = _made({"weights": weights}, path, work / f"{bits}-{name.replace(' ', '-')}", arguments)
        budget = row.setdefault("budget_bytes", size["bytes"])
        if size["bytes"] <= budget:
            found[name] = compared(made)
            row["uniform"][name] = size | _shown(found[name])
    target: dict[str, Any] = {"size": row["budget_bytes"], "sensitivity": arguments.sensitivity}
    recipe = {"weights": {"group_size": 64, "symmetric": False}, "target": target}
    made, size = _made(recipe, path, work / f"{bits}-mixed", arguments)
    kl, nll = compared(made)
    row["mixed"] = size | _shown((kl, nll))
    row["mixed_minus"] = {name: _shown((kl - found[name][0], nll - found[name][1])) for name in found}
    row["wins"] = {
        key: all(each[key][0] + 2 * each[key][1] < 0 for each in row["mixed_minus"].values())
        for key in ("kl", "nll")
    }
    assert size["bytes"] <= row["budget_bytes"]
    return row


def _made(
    recipe: dict[str, Any], path: Path, output: Path, arguments: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """(the packed model, its size)."""
    shutil.rmtree(output, ignore_errors=True)
    weights = recipe["weights"] | {"algorithm": arguments.algorithm}
    given = recipe | {
        "weights": weights,
        "calibration": {"samples": arguments.samples, "sequence_length": 512},
    }
    size = quantize(given, path, output, evaluate=False, device="cpu").manifest.size
    return load(output, device="cpu"), {
        "bytes": size.quantized_bytes,
        "linear_bits_per_weight": size.linear_bits_per_weight,
    }


def _shown(found: tuple[torch.Tensor, torch.Tensor]) -> dict[str, list[float]]:
    return {"kl": mean(found[0]), "nll": mean(found[1])}


def markdown(model: str, row: dict[str, Any]) -> str:
    """One size as a table."""
    lines = [
        f"{model}, at most {row['budget_bytes']:,} bytes",
        "| | bits per weight | KL | ΔNLL | mixed minus it: KL | ΔNLL |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in {**row["uniform"], "mixed": row["mixed"]}.items():
        less = row["mixed_minus"].get(name)
        cells = [_cell(each[key]) for key in ("kl", "nll")] + [
            _cell(less[key]) if less else "" for key in ("kl", "nll")
        ]
        lines.append(f"| {name} | {each['linear_bits_per_weight']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(pair: list[float]) -> str:
    return f"{pair[0]:.4f} ± {pair[1]:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="mixed precision beside uniform schemes of the same size")
    parser.add_argument(
        "--model", type=Path, action="append", help="folder; repeatable; default: both embedded models"
    )
    parser.add_argument("--bits", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--algorithm", default="gptq")
    parser.add_argument("--sensitivity", default="scaled")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    models = arguments.model or [assets.default_model(), assets.mixture_model()]
    settings = {key: getattr(arguments, key) for key in ("algorithm", "sensitivity", "windows", "samples")}
    report = _begun(arguments.json, settings)
    rows = {row["model"]: row for row in report["models"]}

    def keep() -> None:
        report["models"] = [row for row in rows.values() if row["sizes"]]
        if arguments.json:
            write_json(arguments.json, report)

    for path in models:
        measure(path, arguments.work / path.name, arguments, rows.setdefault(path.name, {}), keep)
    print(json.dumps({"mixed": [[row["wins"] for row in each["sizes"]] for each in rows.values()]}))


if __name__ == "__main__":
    main()
