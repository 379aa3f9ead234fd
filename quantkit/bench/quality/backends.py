"""Perplexity and KL of one checkpoint through every backend that can run it.

    python -m quantkit.bench.quality.backends --work DIR [--json FILE]

The embedded model is rounded to nearest at several widths; the same files are then evaluated by the reference and by
the native kernels with float and with int8 activations (PyTorch's int8 op takes half a minute for what these do in
one second). float must be the reference's within 0.05 %; what int8 costs is what this table is for.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import quantkit_eval

from quantkit import assets
from quantkit.bench.machine import machine
from quantkit.checkpoint.load import load
from quantkit.errors import BackendError
from quantkit.files import write_json
from quantkit.models.tokenizer import open_tokenizer
from quantkit.pipeline.quantize import quantize

RECIPES = ("w8a16-rtn", "w4a16-rtn", "w3a16-rtn", "w2a16-rtn")
WAYS = (
    ("reference", "float"),
    ("cpu", "float"),
    ("cpu", "int8"),
    ("cpu", "int8-token"),
)
TOKENS, CONTEXT = 16384, 512


def measure(work: Path) -> list[dict[str, Any]]:
    """One row per recipe and way; a way that cannot run a recipe has its reason instead of numbers."""
    rows = []
    original = load(assets.default_model(), device="cpu")
    tokenizer = open_tokenizer(assets.default_model())
    for recipe in RECIPES:
        folder = work / recipe
        quantize(recipe, output=folder, evaluate=False, device="cpu")
        exact = None
        for backend, compute in WAYS:
            row: dict[str, Any] = {"recipe": recipe, "backend": backend, "compute": compute}
            try:
                model = load(folder, device="cpu", backend=backend, compute=compute)
            except BackendError as error:
                rows.append(row | {"refused": str(error)})
                continue
            report = quantkit_eval.evaluate(
                model,
                tokenizer,
                text=[str(assets.evaluation_text())],
                baseline=original,
                max_tokens=TOKENS,
                context=CONTEXT,
            )
            perplexity = report.quantized.perplexity
            exact = exact or perplexity
            rows.append(
                row
                | {
                    "perplexity": perplexity,
                    "over_reference": perplexity / exact - 1,
                    "kl_mean": report.kl_mean,
                    "kl_mean_se": report.kl_mean_se,
                }
            )
            print(
                f"{recipe:<12} {backend:<10} {compute:<11} {perplexity:9.4f} {perplexity / exact - 1:+.5%} "
                f"KL {report.kl_mean:.5f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments.work)
    if arguments.json:
        write_json(arguments.json, {"schema": "quantkit-backends/1", "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
