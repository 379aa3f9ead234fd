"""Measure decoding behind a long context, with exact and quantized KV caches, natively and inside transformers.

    python -m quantkit.bench.models.cache --work DIR --depth 8192 --json FILE

The 1.1B Llama of quantkit.bench.models.decode (random weights, W4 g128, int8 activations per token and group), batch 1.
Each cache is filled with `depth` random tokens once; a round then decodes `new` tokens behind them with every cache in
turn, and forgets those again. Prefill is measured in the same rounds, on `prompt` tokens behind the context. With
--transformers the same weights run inside transformers too, with the caches named (all if none is): `exact` is
transformers' own one in bf16 with its own attention; they are filled with random keys and values, and a chunk of
`chunk` tokens behind the context is measured beside the prompt. The JSON is written after every round. With
--llamacpp DIR (a folder of quantkit.bench.models.llamacpp) llama.cpp decodes Q4_0 weights with keys and values of
`--llamacpp-caches` at the same depth, in the same rounds; it fills its cache again for each of them, which takes
minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantkit_kernels.cpu.decoder import CACHES, Cache
from transformers import DynamicCache

from quantkit.bench.machine import machine, where
from quantkit.bench.models import decode, llamacpp
from quantkit.bench.rounds import Measured, interleave, ratios
from quantkit.bench.synthetic import SHAPES
from quantkit.files import write_json
from quantkit.layers import kv_attention
from quantkit.layers.kv_cache import QuantizedCache, attach
from quantkit.numerics.kv import KVScales
from quantkit.runtime.native import NativeDecoder, Sequence
from quantkit.scheme import KV_PRESETS

ROTATED = ("int4",)  # caches that rotate keys
FP8_SCALE = 0.02  # stored scale of random keys and values
INSIDE = {"exact": "", "int8": "INT8", "int4": "INT4", "fp8_e4m3": "FP8_TENSOR"}  # presets


def filled(decoder: NativeDecoder, tokens: torch.Tensor) -> Sequence:
    """A sequence with these tokens in its cache."""
    sequence = decoder.start()
    sequence.append(tokens, 0)
    return sequence


def measure(sequence: Sequence, prompt: torch.Tensor, new: int) -> Measured:
    """Tokens per second of decoding and of a prompt behind what the sequence holds; it holds the same afterwards."""
    depth = len(sequence)
    start = time.perf_counter()
    sequence.append(prompt)
    prefill = len(prompt) / (time.perf_counter() - start)
    sequence.truncate(depth)
    token = prompt[:1]
    sequence.append(token)
    start = time.perf_counter()
    for _ in range(new):
        token = sequence.append(token).argmax(-1)
    measured = {"decode": new / (time.perf_counter() - start), "prefill": prefill}
    sequence.truncate(depth)
    return measured


def engines(
    work: Path, caches: list[str], depth: int, prompt: int, new: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """({cache: function that measures once}, {cache: its bytes at this depth})."""
    way = decode.WAYS["native W4A8"]
    model = decode.open_model(decode.models(work)["packed"], way)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (depth + prompt,), generator=random)
    ready: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for kind in caches:
        if kind == "fp8_e4m3":  # its scales are stored
            scale = torch.tensor([FP8_SCALE])
            scales = dict.fromkeys(range(model.config.num_hidden_layers), KVScales(scale, scale))
            attach(model, KV_PRESETS["FP8_TENSOR"], scales)
        sequence = filled(NativeDecoder(model, way.compute, Cache(kind, kind in ROTATED)), tokens[:depth])
        ready[kind] = partial(measure, sequence, tokens[depth:], new)
        sizes[kind] = sequence.cache_bytes
    return ready, sizes


def inside(
    model: Any, attention: str, cache: Any, prompt: torch.Tensor, chunk: torch.Tensor, new: int
) -> Measured:
    """`measure` inside transformers, by a named attention implementation; also of the tokens `chunk`."""
    model.set_attn_implementation(attention)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        found = model(tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1:]
        return torch.as_tensor(found.argmax(-1))

    def speed(tokens: torch.Tensor) -> float:
        start = time.perf_counter()
        step(tokens)
        found = len(tokens) / (time.perf_counter() - start)
        cache.crop(-len(tokens))
        return found

    with torch.inference_mode():
        measured = {"prefill": speed(prompt), "chunk": speed(chunk)}
        token = step(prompt[:1])
        start = time.perf_counter()
        for _ in range(new):
            token = step(token)
        measured["decode"] = new / (time.perf_counter() - start)
        cache.crop(-(new + 1))
    return measured


def within_transformers(
    work: Path, kinds: list[str], depth: int, prompt: int, chunk: int, new: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """As `engines`, of caches inside transformers; their keys and values are random numbers."""
    model = decode.open_model(decode.models(work)["packed"], decode.WAYS["eager W4A8"])
    own, config = model.config._attn_implementation, model.config
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (max(prompt, chunk),), generator=random)
    d = config.hidden_size // config.num_attention_heads
    kv_attention.register()
    ready: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for kind in kinds:
        layers, scale = config.num_hidden_layers, torch.tensor([FP8_SCALE])
        scheme = KV_PRESETS[INSIDE[kind]] if kind != "exact" else None
        cache: Any = DynamicCache()
        if scheme is not None:
            stored = None if scheme.dynamic else dict.fromkeys(range(layers), KVScales(scale, scale))
            cache = QuantizedCache(layers, scheme, stored)
        for layer in range(layers):
            pair = torch.randn(2, 1, config.num_key_value_heads, depth, d, generator=random)
            cache.update(*pair.to(model.dtype), layer)
        name, attention = f"transformers {kind}", own if scheme is None else kv_attention.NAME
        ready[name] = partial(inside, model, attention, cache, tokens[:prompt], tokens[:chunk], new)
        if scheme is None:
            sizes[name] = sum(each.keys.nbytes + each.values.nbytes for each in cache.layers)
        else:
            sizes[name] = cache.nbytes
    return ready, sizes


def peers(
    work: Path, folder: Path, kinds: list[str], depth: int, new: int
) -> dict[str, Callable[[], Measured]]:
    """llama.cpp with each kind of keys and values; decoding only."""
    built = llamacpp.build(folder)
    file = llamacpp.files(built, decode.models(work)["dense"])["Q4_0"]
    threads = torch.get_num_threads()
    return {
        f"llama.cpp {kind}": partial(llamacpp.bench_depth, built.bench, file, threads, depth, new, kind)
        for kind in kinds
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder with 3 GB free")
    parser.add_argument("--llamacpp", type=Path, help="folder in which llama.cpp is built")
    parser.add_argument("--llamacpp-caches", nargs="+", choices=("q8_0", "f16"), default=["q8_0"])
    parser.add_argument(
        "--caches", nargs="*", choices=CACHES, default=list(CACHES), help="of the native path"
    )
    parser.add_argument("--transformers", nargs="*", choices=INSIDE, help="caches inside transformers, too")
    parser.add_argument("--depth", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument(
        "--chunk", type=int, default=512, help="tokens of a longer prompt inside transformers"
    )
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    depth, new = arguments.depth, arguments.new
    ready, sizes = engines(arguments.work, arguments.caches, depth, arguments.prompt, new)
    if arguments.transformers is not None:
        kinds = arguments.transformers or list(INSIDE)
        more, bytes_of = within_transformers(
            arguments.work, kinds, depth, arguments.prompt, arguments.chunk, new
        )
        ready, sizes = ready | more, sizes | bytes_of
    theirs: dict[str, Callable[[], Measured]] = {}
    if arguments.llamacpp:
        folder, kinds = arguments.llamacpp.resolve(), arguments.llamacpp_caches
        theirs = peers(arguments.work, folder, kinds, depth, new)
    facts: dict[str, Any] = {
        "schema": "quantkit-cache/1",
        "machine": machine() | where("cpu"),
        "model": SHAPES["1.1b"]._asdict()
        | {"layers": decode.LAYERS, "scheme": "W4 g128 sym, head too, int8 inputs"},
        "depth": depth,
        "prompt_tokens": arguments.prompt,
        "chunk_tokens": arguments.chunk,
        "new_tokens": new,
        "cache_bytes": sizes,
    }

    def kept(found: dict[str, Any]) -> dict[str, Any]:
        report = facts | found
        report["times_faster"] = {name: ratios(report, name, [*ready, *theirs]) for name in sizes}
        if arguments.json:
            write_json(arguments.json, report)
        return report

    report = kept(interleave(ready | theirs, arguments.rounds, warm=theirs, keep=kept))
    for name, row in report["engines"].items():
        print(
            name,
            *(f"{kind} {found['median']:.1f} tokens/s" for kind, found in row.items()),
            sizes.get(name, ""),
        )


if __name__ == "__main__":
    main()
