"""Measure what running q, k, v and gate, up as one product gains inside transformers.

    python -m quantkit.bench.models.siblings --work DIR --json FILE

The 1.1B Llama of `quantkit.bench.models.decode` (22 layers, random weights, W4 g128, head too) runs inside
transformers with siblings joined and separate: the same loaded model, switched between the two in every round. decode:
greedy steps of one token; step 16: steps of 16 tokens, as in speculative decoding. A ratio is the median of the ratios
within each round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.bench.machine import machine, where
from quantkit.bench.models.decode import LAYERS, Way, models, open_model
from quantkit.bench.rounds import Measured, interleave, ratio
from quantkit.bench.synthetic import SHAPES, Shape
from quantkit.checkpoint.shards import write_json
from quantkit.layers.quant_linear import QuantLinear
from quantkit.layers.siblings import Siblings

COMPUTES = ("float", "int8")
STEP = 16  # tokens


def switch(model: nn.Module) -> Callable[[bool], None]:
    """A function that joins the siblings of a loaded model, or makes every linear run alone."""
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    groups: list[tuple[QuantLinear, Siblings | None]] = [(linear, linear.siblings) for linear in linears]

    def joined(wanted: bool) -> None:
        for linear, group in groups:
            linear.forget()
            linear.siblings = group if wanted else None

    return joined


@torch.inference_mode()
def steps(model: nn.Module, tokens: int, count: int) -> float:
    """Tokens per second of `count` steps of `tokens` tokens each, after a warm-up step."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (count + 1, 1, tokens), generator=random)
    cache = model(input_ids=ids[0], use_cache=True, logits_to_keep=1).past_key_values
    start = time.perf_counter()
    for each in ids[1:]:
        cache = model(input_ids=each, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return count * tokens / (time.perf_counter() - start)


def run(work: Path, layers: int, shape: Shape, rounds: int, new: int) -> dict[str, Any]:
    """Measure every compute with siblings joined and separate, interleaved."""
    packed = models(work, layers, shape)["packed"]
    engines: dict[str, Callable[[], Measured]] = {}
    for compute in COMPUTES:
        model = open_model(packed, Way("packed", compute=compute, backend="cpu"))
        joined = switch(model)

        def measured(wanted: bool, model: nn.Module = model, joined: Any = joined) -> Measured:
            joined(wanted)
            return {"decode": steps(model, 1, new), f"step {STEP}": steps(model, STEP, max(1, new // STEP))}

        engines[f"{compute}, joined"] = lambda measured=measured: measured(True)
        engines[f"{compute}, apart"] = lambda measured=measured: measured(False)
    report = {
        "schema": "quantkit-siblings/1",
        "machine": machine() | where("cpu"),
        "model": shape._asdict() | {"layers": layers, "scheme": "W4 g128 sym, head too"},
        "new_tokens": new,
        **interleave(engines, rounds),
    }
    report["joined_over_apart"] = {
        compute: {
            kind: ratio(report, kind, f"{compute}, joined", f"{compute}, apart")
            for kind in ("decode", f"step {STEP}")
        }
        for compute in COMPUTES
    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder with 3 GB free")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    report = run(arguments.work, arguments.layers, shape, arguments.rounds, arguments.new)
    for compute, found in report["joined_over_apart"].items():
        print(
            f"{compute}: joined is {', '.join(f'{x:.3f} times apart at {kind}' for kind, x in found.items())}"
        )
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
