"""Time tile sizes on this GPU and write a table for `configs.py`.

    python -m quantkit_kernels.triton.tune [--output FILE] [--bits 4 8] [--shapes 4096x4096 ...] [--seconds 480]

Every candidate is first compared with the twin; a wrong one ends the run. The copies of a weight exceed the cache, and
a CUDA graph that calls each copy once is timed, so neither the cache nor Python affects the numbers. Shapes are
[N]x[K]. The file is written after every shape; shapes that the time was too short for keep the rule.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from quantkit_kernels.triton.configs import BUCKETS, DEQUANTIZE_FROM, TABLES, Config, rule
from quantkit_kernels.triton.launch import chip, dequantize, launch
from quantkit_kernels.triton.layout import ROWS, Geometry, geometry, reads_by_row
from quantkit_kernels.triton.op import _twin

SHAPES = [
    "6144x4096",
    "4096x4096",
    "28672x4096",
    "4096x14336",
]  # fused q/k/v, o, fused gate/up, down of Llama-3-8B
CROSSOVER = (192, 256, 384, 512, 768, 1024, 1536)
_ROTATE = 256 << 20  # bytes, five times the cache of an H200


@dataclass(frozen=True)
class Problem:
    """One weight shape in as many random copies as fill `_ROTATE`."""

    bits: int
    group: int
    n: int
    k: int
    cut: Geometry
    copies: list[tuple[torch.Tensor, torch.Tensor]]  # codes, scales

    @classmethod
    def random(cls, bits: int, group: int, n: int, k: int, device: torch.device) -> Problem:
        """Symmetric codes; zeros cost the same."""
        cut = geometry(bits, group, k)
        blocks = -(-n // ROWS)
        plane = (cut.h // 16, 16 * ROWS) if reads_by_row(device) else (ROWS // 2, 2 * cut.h)
        shape = (blocks, cut.chunks, cut.planes, *plane)
        copies = []
        count = max(2, -(-_ROTATE * 8 // (n * k * bits)))
        for _ in range(count):
            codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
            scales = torch.randn(blocks, -(-cut.groups // 2), ROWS, 2, device=device) / k**0.5
            copies.append((codes, scales.bfloat16()))
        return cls(bits, group, n, k, cut, copies)

    def run(self, x: torch.Tensor, copy: int, config: Config) -> torch.Tensor:
        """The kernel on one copy."""
        codes, scales = self.copies[copy]
        return launch(x, codes, scales, None, None, self.bits, self.group, self.n, self.k, config)

    def dense(self, x: torch.Tensor, copy: int) -> torch.Tensor:
        """Dequantize W, then multiply by PyTorch's matmul."""
        codes, scales = self.copies[copy]
        w = dequantize(codes, scales, None, self.bits, self.group, self.n, self.k, x.dtype)
        return torch.nn.functional.linear(x, w)


def candidates(bits: int, bucket: int, n: int, cut: Geometry, processors: int, major: int) -> list[Config]:
    """The rule's choice and its neighbours, the rule first."""
    first = rule(bits, bucket, n, cut, processors, major)
    found = [first]
    tiles = [first.bm, 8] if bucket == 16 else [first.bm]
    for bm in tiles:
        for bn in (64, 128) if bm < 64 else (128,):
            for unroll in (1, 2) if bm <= 32 else (1,):
                for warps in (4, 8) if bm >= 64 else (4,):
                    for stages in (3, 4, 6) if bm <= 32 else (2, 3, 4):
                        trips = cut.chunks // unroll
                        blocks = -(-n // bn) * -(-bucket // bm)
                        wanted = {1, max(1, processors // blocks), max(1, 2 * processors // blocks)}
                        wanted.add(max(1, 3 * processors // blocks))
                        for splits in sorted(min(s, trips, 16) for s in wanted):
                            found.append(Config(bm, bn, unroll, splits, warps, stages))
    fits = (c for c in found if cut.chunks % c.unroll == 0)
    return list(dict.fromkeys(fits))


def microseconds(call: Callable[[int], object], copies: int, rounds: int = 5) -> float:
    """Median time of one call in a CUDA graph of one call per copy."""
    call(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    graph.replay()
    times: list[float] = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / copies)
    return statistics.median(times)


def best(problem: Problem, bucket: int, deadline: float) -> tuple[Config, float] | None:
    """The fastest candidate at M = bucket that agrees with the twin, and its time; None if there was no time."""
    device = problem.copies[0][0].device
    _, processors, major = chip(device)
    x = torch.randn(bucket, problem.k, device=device).bfloat16()
    codes, scales = problem.copies[0]
    truth = _twin(x.float(), codes, scales, None, None, problem.bits, problem.group, problem.n, problem.k)
    found: tuple[Config, float] | None = None
    for config in candidates(problem.bits, bucket, problem.n, problem.cut, processors, major):
        if time.monotonic() > deadline:
            break
        try:
            y = problem.run(x, 0, config)
        except Exception as error:  # shared memory or registers: triton has its own type in each version
            if type(error).__name__ != "OutOfResources":
                raise
            continue
        off = ((y.float() - truth).norm() / truth.norm()).item()
        if not off < 4e-3:
            sys.exit(f"{config} is wrong on {problem.bits} bits [{problem.n}, {problem.k}]: off by {off:.3g}")
        took = microseconds(partial(problem.run, x, config=config), len(problem.copies))
        if found is None or took < found[1]:
            found = config, took
    return found


def crossover(problem: Problem) -> int:
    """The first M of CROSSOVER at which dequantizing W first is faster; beyond the last if it never is."""
    device = problem.copies[0][0].device
    _, processors, major = chip(device)
    for m in CROSSOVER:
        x = torch.randn(m, problem.k, device=device).bfloat16()
        config = rule(problem.bits, m, problem.n, problem.cut, processors, major)
        fused = microseconds(partial(problem.run, x, config=config), 2)
        if microseconds(partial(problem.dense, x), 2) < fused:
            return m
    return 2 * CROSSOVER[-1]


def main() -> None:
    """Parse, tune, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--seconds", type=float, default=480)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    import triton

    name = torch.cuda.get_device_name()
    output = arguments.output or TABLES / (name.lower().replace(" ", "-") + ".json")
    deadline = time.monotonic() + arguments.seconds
    table = {"chip": name, "triton": triton.__version__, "torch": torch.__version__}
    table |= {"dequantize_from": DEQUANTIZE_FROM, "entries": []}
    for bits in arguments.bits:
        for shape in arguments.shapes:
            n, k = (int(size) for size in shape.split("x"))
            problem = Problem.random(bits, arguments.group, n, k, torch.device("cuda"))
            if not table["entries"]:
                table["dequantize_from"] = crossover(problem)
            for bucket in BUCKETS:
                if found := best(problem, bucket, deadline):
                    config, took = found
                    entry = [bits, arguments.group, False, bucket, n, k, list(config), round(took, 2)]
                    table["entries"].append(entry)
                    gigabytes = n * k * bits / 8e3 / took
                    print(f"W{bits} [{n}, {k}] M={bucket}: {took:.1f} us, {gigabytes:.0f} GB/s, {config}")
            output.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps({"table": str(output), "entries": len(table["entries"])}))


if __name__ == "__main__":
    main()
