"""Measure the overhead of a call: the time that does not depend on the size of the product."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import quantkit_kernels
import torch

from quantkit.bench.kernels.ops import Source


def call_overhead(calls: int = 1000, rounds: int = 7) -> dict[str, float]:
    """Microseconds per call on one 16 x 128 unit, for each way of calling; warm, one thread.

    ctypes: the C function with known addresses and an allocated output. forward, layer: `QuantLinear.forward` and its
    `__call__`, the cost in a loaded model. run: the backend's function, which the cells time. op: the torch op, which
    compiled and exported models contain.
    """
    from quantkit_kernels.cpu import layout, library, ops
    from quantkit_kernels.cpu.layout import layout_of

    from quantkit.layers.quant_linear import QuantLinear
    from quantkit.scheme import PRESETS

    packed = layout.pack(Source.random(16, 128, 4, 128, "cpu").stored)
    x, y, weight = torch.zeros(1, 128), torch.empty(1, 16), packed.weight()
    linear, x_at, y_at = library.required().qk_linear, x.data_ptr(), y.data_ptr()
    facts = (4, 128, 16, 128, True, ops.FLOAT, packed.scale_factor, packed.scale_type)
    backend, prepared = quantkit_kernels.backend("cpu"), layout_of(packed)
    layer = QuantLinear(128, 16, PRESETS["W4A16"], False, torch.float16)
    for tensor in layer.buffers():
        tensor.zero_()
    layer.prepare("cpu", torch.float32)
    runs: dict[str, Callable[[], object]] = {
        "ctypes": lambda: linear(weight, x_at, 0, 1, ops.FLOAT, y_at, 0, 1),
        "forward": lambda: layer.forward(x),
        "layer": lambda: layer(x),
        "run": lambda: backend.linear(prepared, x, None),
        "op": lambda: torch.ops.quantkit.cpu_linear(x, packed.units, None, *facts),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, once in runs.items():
                start = time.perf_counter()
                for _ in range(calls):
                    once()
                times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}
