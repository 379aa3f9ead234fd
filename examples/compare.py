"""Measure two checkpoints against the same original on the same tokens, and say which is closer to it.

    python examples/compare.py ORIGINAL FIRST SECOND [--text FILE] [--tokens N] [--context N]

Each may be a folder or a hub id, packed by quantkit or not.
"""

import argparse

import quantkit
from quantkit import assets
from quantkit.models.headers import resolve_model
from quantkit.models.tokenizer import open_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("original")
    parser.add_argument("checkpoints", nargs=2, metavar="CHECKPOINT")
    parser.add_argument("--text", default=str(assets.evaluation_text()), help="default: quantkit's own text")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=256, help="tokens per window")
    arguments = parser.parse_args()
    original = quantkit.load(arguments.original, device="auto")
    tokenizer = open_tokenizer(resolve_model(arguments.original, assets.default_model()))
    distances = {}
    for name in arguments.checkpoints:
        report = quantkit.evaluate(
            quantkit.load(name, device="auto"),
            tokenizer,
            text=[arguments.text],
            baseline=original,
            context=arguments.context,
            max_tokens=arguments.tokens,
        ).to_json()
        distances[name] = report["kl_mean"]
        error = report["kl_mean_se"]
        print(
            f"{name}: perplexity {report['quantized']['perplexity']:.3f}, KL to the original {report['kl_mean']:.5f}"
            + (f" ± {error:.5f}" if error is not None else "")
            + f", same most likely token {report['top1_agreement']:.1%}"
        )
    print(f"closer to the original: {min(distances, key=distances.get)}")


if __name__ == "__main__":
    main()
