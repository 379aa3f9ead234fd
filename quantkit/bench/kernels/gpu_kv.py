"""Time attention of one new token over a cache on a GPU: our kernel over INT8 and FP8 codes, and PyTorch's over bf16.

    python -m quantkit.bench.kernels.gpu_kv --json gpu-kv.json [--sizes 1x4096 32x4096]

Shapes are those of Llama-3-8B: 32 query heads, 8 kv heads of 128 channels; sizes are [sequences]x[tokens]. Each op is
timed in a CUDA graph over copies that exceed the cache of the chip, all interleaved: a ratio is the median over rounds.
PyTorch's attention is the fastest of its implementations. An op whose output is off by more than CLOSE is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quantkit_kernels.reference.kv_attention import quantize_entries
from quantkit_kernels.triton.kv_op import kv_decode
from quantkit_kernels.triton.tune import microseconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from quantkit.bench.machine import machine
from quantkit.bench.roofline import read_bandwidth
from quantkit.files import write_json

HEADS, KV_HEADS, CHANNELS = 32, 8, 128
SIZES = ["1x1024", "1x4096", "1x16384", "8x4096", "32x4096", "128x8192"]
ROTATION = 256 << 20  # bytes, five times the cache of an H200
CLOSE = 5e-3  # relative error to fp64 attention over the codes
CODES = {"INT8": torch.int8, "FP8": torch.float8_e4m3fn}
SDPA = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
Call = Callable[[int], object]  # on one of the copies


def ours(q: torch.Tensor, kv: torch.Tensor, name: str, copies: int) -> tuple[Call, int, float]:
    """(the call, bytes of the cache, its relative error). q: [B, heads, d]; kv: keys and values [2, B, H, S, d]."""
    _, b, _, places, _ = kv.shape
    stored = None if name == "INT8" else torch.full((1, KV_HEADS, 1), 0.01, device=kv.device)
    made = [quantize_entries(x, CODES[name], stored) for x in kv]
    parts = [part for codes, scale in made for part in (codes, scale.contiguous())]
    first = torch.zeros(b, dtype=torch.int32, device=kv.device)
    end, factor = first + places, CHANNELS**-0.5
    found = kv_decode(q, *parts, first, end, factor, 0.0)
    k, v = (codes[:1].double() * scale[:1].double()[..., None] for codes, scale in made)  # of one sequence
    truth = scaled_dot_product_attention(q[:1, :, None].double(), k, v, enable_gqa=True)[:, :, 0]
    error = float((found[:1].double() - truth).norm() / truth.norm())
    every = [parts] + [[part.clone() for part in parts] for _ in range(copies - 1)]
    size = sum(part.nbytes for part in parts)
    return lambda i: kv_decode(q, *every[i], first, end, factor, 0.0), size, error


def torchs(q: torch.Tensor, kv: torch.Tensor, copies: int) -> tuple[Call, str]:
    """The fastest of PyTorch's implementations over bf16, and its name."""
    every = [kv] + [kv.clone() for _ in range(copies - 1)]

    def by(backend: SDPBackend) -> Call:
        def call(i: int) -> object:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q[:, :, None], every[i][0], every[i][1], enable_gqa=True)

        return call

    times: dict[str, tuple[float, Call]] = {}
    for backend in SDPA:
        try:
            times[backend.name] = microseconds(by(backend), copies), by(backend)
        except RuntimeError:  # it does not take these inputs
            continue
    best = min(times, key=lambda name: times[name][0])
    return times[best][1], best


def size_row(sequences: int, tokens: int, rounds: int) -> dict[str, Any]:
    """The report of one size."""
    g = torch.Generator("cuda").manual_seed(0)
    shape = (2, sequences, KV_HEADS, tokens, CHANNELS)
    kv = torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(sequences, HEADS, CHANNELS, generator=g, device="cuda", dtype=torch.bfloat16)
    copies = max(2, -(-ROTATION * 2 // kv.nbytes))
    call, backend = torchs(q, kv, copies)
    calls = {"bf16": call}
    rows: list[dict[str, Any]] = [{"cache": "bf16", "attention": backend, "bytes": kv.nbytes}]
    for name in CODES:
        made, size, error = ours(q, kv, name, copies)
        rows.append({"cache": name, "bytes": size, "relative_error": error})
        if error < CLOSE:
            calls[name] = made
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, each in calls.items():
            times[name].append(microseconds(each, copies))
    read = read_bandwidth("cuda")
    for row in rows:
        name = row["cache"]
        if name in times:
            ratios = (a / b for a, b in zip(times["bf16"], times[name], strict=True))
            middle = statistics.median(times[name])
            row |= {"us": middle, "us_min": min(times[name]), "us_max": max(times[name])}
            row |= {
                "times_faster": statistics.median(ratios),
                "share_of_read": row["bytes"] / middle * 1e6 / read,
            }
    return {"sequences": sequences, "tokens": tokens, "caches": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    rows = []
    for size in arguments.sizes:
        sequences, tokens = (int(number) for number in size.split("x"))
        with torch.inference_mode():
            rows.append(size_row(sequences, tokens, arguments.rounds))
        print(json.dumps(rows[-1]), flush=True)
        if arguments.json:
            write_json(arguments.json, {"schema": "quantkit-gpu-kv/1", "machine": machine(), "rows": rows})
    sys.exit(any("us" not in row for size in rows for row in size["caches"]))


if __name__ == "__main__":
    main()
