"""Choose tile sizes: from a table that `tune` measured on the chip, else by a rule.

A table is a JSON file beside this one, named after the chip ("nvidia-h200.json"):

    {"chip": ..., "triton": ..., "torch": ..., "dequantize_from": M,
     "entries": [[bits, group, fp8, bucket, N, K, [bm, bn, unroll, splits, warps, stages], microseconds], ...]}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from quantkit_kernels.triton.layout import Geometry

TABLES = Path(__file__).parent
ENVIRONMENT = "QUANTKIT_TRITON_TABLE"  # a file used instead of the shipped one
BUCKETS = (16, 32, 64, 128)
DEQUANTIZE_FROM = 768  # tokens from which W is written out once for PyTorch's matmul


class Config(NamedTuple):
    """Tile [BN, BM], chunks per trip of the loop, programs that share K, warps and pipeline stages."""

    bm: int
    bn: int
    unroll: int
    splits: int
    warps: int
    stages: int


class Table(NamedTuple):
    """The measurements of a chip; empty if there are none."""

    dequantize_from: int = DEQUANTIZE_FROM
    entries: Mapping[tuple[int, int, bool, int, int, int], Config] = MappingProxyType({})


def bucket(m: int) -> int:
    """The tile of M: 16, 32, 64 or 128."""
    return next((b for b in BUCKETS if m <= b), BUCKETS[-1])


@cache
def table(chip: str) -> Table:
    """The table of a chip (the name the driver gives), empty if none is shipped."""
    forced = os.environ.get(ENVIRONMENT)
    path = Path(forced) if forced else TABLES / (chip.lower().replace(" ", "-") + ".json")
    if not forced and not path.exists():
        return Table()
    data = json.loads(path.read_text())
    return Table(data["dequantize_from"], {tuple(e[:6]): Config(*e[6]) for e in data["entries"]})


def rule(bits: int, m: int, n: int, cut: Geometry, processors: int, major: int = 9) -> Config:
    """Trips of 256 columns, and splits until every multiprocessor has two programs or one would get under 16 KiB.

    major: of the compute capability, 0 on AMD; below 9 accumulators and weights share the registers of a warp.
    """
    bm = min(bucket(m), 64) if bits in (2, 3) or major < 9 else bucket(m)
    warps = 8 if bm >= 64 else 4
    two = {2: bm <= 32, 3: False, 4: bm <= 64}.get(bits, bm == 64 and major >= 9)
    unroll = 2 if two and cut.chunk <= 128 and cut.chunks % 2 == 0 else 1
    stages = 3 if unroll == 2 or bm == 128 else 4
    if bits in (2, 3) and bm == 64:  # a chunk of 256 columns brings four or eight tiles of x
        stages = 2 if bits == 3 else 3
    if major == 0:  # 64 KiB of shared memory
        stages = 2
    trips = cut.chunks // unroll
    for bn in (128, 64):
        tiles = -(-n // bn) * -(-m // bm)
        fewest = -(-16384 * 8 // (bn * cut.chunk * bits * unroll))  # trips that move 16 KiB of weights
        splits = max(1, min(-(-2 * processors // tiles), trips // fewest, 16))
        if tiles * splits >= processors or bm >= 64:
            break
    each = -(-trips // splits)
    return Config(bm, bn, unroll, -(-trips // each), warps, stages)


def choose(
    chip: str,
    bits: int,
    group: int,
    fp8: bool,
    m: int,
    n: int,
    k: int,
    cut: Geometry,
    processors: int,
    major: int = 9,
) -> Config:
    """The measured configuration of a shape, else the rule's."""
    found = table(chip).entries.get((bits, group, fp8, bucket(m), n, k))
    return found or rule(bits, m, n, cut, processors, major)
