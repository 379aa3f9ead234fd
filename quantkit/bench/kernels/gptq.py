"""Time GPTQ's solving of weights: its column loops as kernels against torch's ops, and experts as one batch.

    python -m quantkit.bench.kernels.gptq --device cuda --json gptq.json [--rounds 5]

The default GPTQ (W4 g128 symmetric) on random weights and inputs. "torch" runs the loops over columns as torch's ops,
"kernels" as quantkit's (native on the CPU, Triton on a GPU), each weight after the other; "batch" solves all experts as
one. All interleaved, after a warm-up round; numbers are weights per second, a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from quantkit.algorithms import columns
from quantkit.algorithms.config import GptqConfig
from quantkit.algorithms.gptq import quantize, quantize_all
from quantkit.bench.machine import machine
from quantkit.bench.roofline import read_bandwidth
from quantkit.bench.rounds import Measured, interleave, ratios
from quantkit.files import write_json
from quantkit.numerics.statistics import Statistics
from quantkit.scheme import integer

Case = tuple[int, int, int]  # weights, their rows, their columns
CASES: dict[str, dict[str, Case]] = {
    "cuda": {"dense 4096 x 4096": (1, 4096, 4096), "16 experts 768 x 2048": (16, 768, 2048)},
    "cpu": {"dense 2048 x 2048": (1, 2048, 2048), "4 experts 768 x 1024": (4, 768, 1024)},
}
GRID, CONFIG = integer(4, 128), GptqConfig.model_validate({"name": "gptq"})


def statistics(k: int, seed: int, device: str) -> Statistics:
    """Of correlated random inputs that drift a little."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * k, k, generator=generator) @ (
        torch.eye(k) + torch.randn(k, k, generator=generator) / k
    )
    x = (x * torch.rand(k, generator=generator)).to(device)
    moved = x + 0.01 * torch.randn(x.shape, generator=generator).to(device)
    h, drift = moved.T @ moved / k, (x - moved).T @ moved / k
    return Statistics(2 * k, h, drift, mean_square=h.diagonal() / 2)


def again(given: Statistics) -> Statistics:
    """A copy that may be used up."""
    assert given.hessian is not None
    assert given.drift is not None
    return Statistics(given.tokens, given.hessian.clone(), given.drift.clone(), mean_square=given.mean_square)


def engines(case: Case, device: str) -> dict[str, Callable[[], Measured]]:
    """Each solves all weights of a case once."""
    count, n, k = case
    generator = torch.Generator().manual_seed(count)
    weights = [torch.randn(n, k, generator=generator).to(device) for _ in range(count)]
    known = [statistics(k, seed, device) for seed in range(count)]

    def timed(run: Callable[[Sequence[Statistics]], object]) -> Measured:
        given = [again(each) for each in known]
        _wait(device)
        start = time.perf_counter()
        run(given)
        _wait(device)
        return {"gptq": count / (time.perf_counter() - start)}

    def single(given: Sequence[Statistics]) -> None:
        for weight, each in zip(weights, given, strict=True):
            quantize(weight, each, GRID, torch.bfloat16, CONFIG)

    def by_torch(given: Sequence[Statistics]) -> None:
        with mock.patch.object(columns, "loops_for", return_value=None):
            single(given)

    found = {"torch": lambda: timed(by_torch), "kernels": lambda: timed(single)}
    if count > 1:
        found["batch"] = lambda: timed(
            lambda given: quantize_all(weights, given, GRID, torch.bfloat16, CONFIG)
        )
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(device: str, rounds: int, cases: dict[str, Case]) -> list[dict[str, Any]]:
    """A row for every case."""
    rows = []
    for name, case in cases.items():
        print(name, flush=True)
        run = interleave(engines(case, device), rounds, lambda: read_bandwidth(device), unit="weights/s")
        faster = {kind: ratios(run, kind, ["torch"]) for kind in run["engines"] if kind != "torch"}
        rows.append({"case": name, "shape": case, "times_torch": faster} | run)
        for kind, over in faster.items():
            print(f"{kind}: {over['torch']['gptq']:.2f} times torch's ops", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=CASES, default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments.device, arguments.rounds, CASES[arguments.device])
    if arguments.json:
        where = machine() | {"threads": torch.get_num_threads(), "device": arguments.device}
        write_json(arguments.json, {"schema": "quantkit-gptq/1", "machine": where, "rows": rows})


if __name__ == "__main__":
    main()
