"""What quantized KV caches cost: perplexity against the exact cache as decoding sees it, and bytes per token.

    python -m quantkit.bench.quality.kv_caches --work DIR [--model PATH] [--json FILE]
    python -m quantkit.bench.quality.kv_caches --work DIR --long docs/benchmarks/long-texts.json

Every row runs the same weights in fp32, with a quantized cache and with an exact one on the same windows of 512 tokens
of the embedded evaluation text. FP8 rows are checkpoints that `quantkit quantize` made with `weights: none`. Bytes are
those of a cache that was filled, against 2 bytes a number in bf16. --long instead lets the model write texts of 2,000
tokens with some of the caches and with an exact one, as `quantkit eval --long 2000` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quantkit_eval
import torch

from quantkit import assets
from quantkit.bench.machine import commit, machine
from quantkit.checkpoint.load import load
from quantkit.files import write_json
from quantkit.layers.kv_cache import cache_of
from quantkit.models.tokenizer import open_tokenizer
from quantkit.pipeline.quantize import quantize
from quantkit.runtime import choose_runner
from quantkit.scheme import KV_PRESETS, KVScheme

CONTEXT = 512
INT4 = KV_PRESETS["INT4"]
CACHES: dict[str, KVScheme] = {
    "INT8": KV_PRESETS["INT8"],
    "FP8": KV_PRESETS["FP8"],
    "FP8_TENSOR": KV_PRESETS["FP8_TENSOR"],
    "INT4": INT4,
    "INT4, first 4 exact": KVScheme(INT4.keys, INT4.values, sinks=4, rotate=True),
    "INT4, not rotated": KVScheme(INT4.keys, INT4.values),
}
LONG = ("INT8", "FP8", "INT4")


def measure(path: Path, work: Path, tokens: int) -> list[dict[str, Any]]:
    """One row per cache of the model in `path`."""
    exact, tokenizer = load(path, device="cpu"), open_tokenizer(path)
    rows = []
    for name, scheme in CACHES.items():
        model, make = _with_cache(path, work, name, scheme)
        report = quantkit_eval.evaluate(
            model, tokenizer, assets.evaluation_text(), exact, CONTEXT, max_tokens=tokens, cache=make
        )
        row = {"cache": name, "scheme": str(scheme), "evaluation": report.to_json()}
        rows.append(row | {"of_bf16": _share(model, make())})
        print(_line(rows[-1]), flush=True)
    return rows


def measure_long(path: Path, work: Path) -> list[dict[str, Any]]:
    """One row per cache of LONG: what it costs in long texts of the model in `path`, by position."""
    rows, tokenizer = [], open_tokenizer(path)
    exact = _as_it_decodes(load(path, device="cpu"))
    for name in LONG:
        side = _as_it_decodes(_with_cache(path, work, name, CACHES[name])[0])
        report = quantkit_eval.long_generation(side, tokenizer, assets.evaluation_text(), exact)
        rows.append({"cache": name, "commit": commit(), "report": report.to_json()})
        for written in report.written:
            print(f"{name}, {written.way}: KL {1e3 * written.kl_mean:.2f}e-3", flush=True)
    return rows


def _as_it_decodes(model: Any) -> quantkit_eval.Side:
    """A model as `eval --long` runs it: natively if its family and its cache can be."""
    runner, make = choose_runner(model, 1), cache_of(model)
    if runner.way == "native":
        return quantkit_eval.Side(runner.model, description=make().description if make else None)
    return quantkit_eval.Side(model, make)


def _with_cache(path: Path, work: Path, name: str, scheme: KVScheme) -> tuple[Any, Callable[[], Any]]:
    """(the model with this cache, what makes an empty one); stored scales are calibrated first."""
    if not scheme.dynamic:
        recipe = {"weights": "none", "kv_cache": name}
        path = quantize(recipe, path, work / f"{path.name}-{name}", evaluate=False).output
    model = load(path, device="cpu", kv_cache=scheme)
    make = cache_of(model)
    assert make is not None
    return model, make


@torch.no_grad()
def _share(model: Any, cache: Any) -> float:
    """Bytes of a cache filled with CONTEXT tokens, over those of its numbers in bf16."""
    model(input_ids=torch.arange(CONTEXT)[None], past_key_values=cache, use_cache=True)
    config = model.config.get_text_config()
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * CONTEXT
    return float(cache.nbytes / (2 * numbers))


def _line(row: dict[str, Any]) -> str:
    e = row["evaluation"]
    ratio = e["quantized"]["perplexity"] / e["original"]["perplexity"] - 1
    return (
        f"| {row['cache']} | {e['quantized']['perplexity']:.4f} | {ratio:+.3%} | "
        f"{e['delta_nll']:+.5f} ± {e['delta_nll_se']:.5f} | {1e3 * e['kl_mean']:.3f} ± {1e3 * e['kl_mean_se']:.3f} | "
        f"{row['of_bf16']:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--model", type=Path, default=assets.default_model())
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--long", type=Path, metavar="FILE", help="write long texts instead; the report's file"
    )
    arguments = parser.parse_args()
    if arguments.long:
        rows = measure_long(arguments.model, arguments.work)
        write_json(arguments.long, {"schema": "quantkit-long-texts/1", "machine": machine(), "rows": rows})
        return
    print(
        "| cache | perplexity | against exact | paired ΔNLL | KL x 1e-3 | of bf16 |\n|---|---|---|---|---|---|"
    )
    rows = measure(arguments.model, arguments.work, arguments.tokens)
    if arguments.json:
        write_json(arguments.json, {"schema": "quantkit-kv-caches/1", "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
