"""Quantize a model from Python with a recipe of your own, and print what it cost.

    python examples/quantize.py [MODEL] [--output DIR]

Without MODEL the small model that comes with quantkit is quantized, which takes about half a minute on two cores.
"""

import argparse
from pathlib import Path

import quantkit

# The same keys as in a YAML recipe (docs/recipe.md). Rules are tried in order and the last that matches wins.
RECIPE = {
    "weights": {"bits": 4, "group_size": 64, "algorithm": "gptq"},
    "rules": [
        {"match": "*.down_proj", "bits": 8},
        {"match": "*.layers.0.*", "skip": True},
    ],
    "calibration": {"samples": 8, "sequence_length": 128, "seed": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "model", nargs="?", help="folder or hub id; default: the model that comes with quantkit"
    )
    parser.add_argument("--output", type=Path, default=Path("out/example"))
    arguments = parser.parse_args()
    result = quantkit.quantize(RECIPE, model=arguments.model, output=arguments.output, eval_tokens=2048)
    size, measured = result.report.size, result.report.evaluation
    print(f"size: {size.original_bytes / 1e6:.2f} MB -> {size.quantized_bytes / 1e6:.2f} MB")
    if measured:
        before, after = measured.original.perplexity, measured.quantized.perplexity
        print(f"perplexity: {before:.2f} -> {after:.2f}, KL {measured.kl_mean:.4f}")
    print(f"files: {result.output}")


if __name__ == "__main__":
    main()
