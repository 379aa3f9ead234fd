"""Measure the limits of the machine: bytes read per second and operations per second.

    python -m quantkit.bench.roofline [--threads 1 2]
    python -m quantkit.bench.roofline --keep     # for `quantkit plan --hardware auto`

An op that reads B bytes and does F operations takes at least max(B / read, F / peak). On a CPU the native library
measures both (`cpu/probe.cpp`: volatile asm, several access patterns). Without it, and on a GPU, PyTorch measures a
sum over a large buffer and a large matrix product, which reach less than the hardware can do.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from quantkit.cost.hardware import Hardware, keep
from quantkit.device import cpu_name

KINDS = ("int8", "fp32", "bf16", "int16")  # in the order of the numbers that qk_peak takes
CAN_USE = {
    "fp32": ("fp32",),
    "bf16": ("bf16", "int16", "fp32"),
    "int8": KINDS,
}  # what an op of a kind may compute in
BUFFER = 512 << 20  # bytes; shared last-level caches help up to 64 MB


class Roofline(NamedTuple):
    """Limits of a device. read: bytes/s; peak: operations/s by kind (a multiply-add is 2; no instruction: 0)."""

    read: float
    peak: dict[str, float]
    source: str

    def seconds(self, n_bytes: float, operations: float, kind: str) -> float:
        """Lower bound of an op's time, by the fastest instructions for activations of `kind`."""
        peak = max(self.peak.get(usable, 0) for usable in CAN_USE[kind])
        return max(n_bytes / self.read, operations / peak if peak else 0.0)

    def report(self) -> dict[str, Any]:
        return {"read_bytes_per_s": self.read, "peak_operations_per_s": self.peak, "source": self.source}


def probe() -> ctypes.CDLL | None:
    """The native library with the signatures of its two probes; None if it is not built."""
    try:
        from quantkit_kernels.cpu.library import load
    except ImportError:
        return None
    library = load()
    if library is None:
        return None
    library.qk_read_bandwidth.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    library.qk_read_bandwidth.restype = ctypes.c_double
    library.qk_peak.argtypes = [ctypes.c_int, ctypes.c_int]
    library.qk_peak.restype = ctypes.c_double
    return library


def measure(
    device: str = "cpu", threads: int | None = None, buffer: int = BUFFER, rounds: int = 3
) -> Roofline:
    """Measure the roofline of `device`. threads: CPU threads, default torch's."""
    read = read_bandwidth(device, threads, buffer, rounds)
    library = probe() if device == "cpu" else None
    if library is not None:
        n = threads or torch.get_num_threads()
        return Roofline(read, {kind: library.qk_peak(i, n) for i, kind in enumerate(KINDS)}, "native probe")
    return Roofline(read, _matmul_peaks(device), "torch sum and matmul")


def read_bandwidth(
    device: str = "cpu", threads: int | None = None, buffer: int = BUFFER, rounds: int = 3
) -> float:
    """Bytes per second read from `buffer` bytes, median of `rounds`."""
    library = probe() if device == "cpu" else None
    if library is not None:
        return float(library.qk_read_bandwidth(buffer, threads or torch.get_num_threads(), rounds))
    values = torch.ones(buffer // 4, device=device)
    return values.nbytes / _median_seconds(values.sum, device, rounds)


def _matmul_peaks(device: str) -> dict[str, float]:
    """Operations per second of torch's own products: fp32 and bf16, on a GPU also int8."""
    size = 8192 if device != "cpu" else 1024
    x = torch.randn(size, size, device=device)
    half = x.bfloat16()
    products: dict[str, Callable[[], Any]] = {"fp32": lambda: x @ x, "bf16": lambda: half @ half}
    if device != "cpu":
        codes = torch.randint(-9, 9, (size, size), dtype=torch.int8, device=device)
        products["int8"] = lambda: torch._int_mm(codes, codes.T)
    return {"int8": 0.0} | {
        kind: 2 * size**3 / _median_seconds(run, device, 3) for kind, run in products.items()
    }


def _median_seconds(run: Callable[[], Any], device: str, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def describe(roofline: Roofline) -> str:
    """ "read 61.8 GB/s; peak int8 0.93, fp32 0.23, bf16 0.47 Tops/s (native probe)"."""
    peaks = ", ".join(f"{kind} {peak / 1e12:.2f}" for kind, peak in roofline.peak.items() if peak)
    return f"read {roofline.read / 1e9:.1f} GB/s; peak {peaks} Tops/s ({roofline.source})"


def as_hardware(device: str, found: Roofline) -> Hardware:
    """The measured limits as `quantkit plan` takes them: per kind of number, the fastest instructions for it."""
    names = {"fp32": "fp32", "fp16": "bf16", "int8": "int8"}
    peak = {name: max(found.peak.get(each, 0) for each in CAN_USE[kind]) for name, kind in names.items()}
    if device == "cpu":
        title, memory = cpu_name(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        properties = torch.cuda.get_device_properties(device)
        title, memory = properties.name, properties.total_memory
    return Hardware("auto", title, memory, found.read, peak, found.source)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--keep", action="store_true", help="measure with all threads and keep it for quantkit plan"
    )
    arguments = parser.parse_args()
    if arguments.keep:
        found = measure(arguments.device)
        print(f"{keep(as_hardware(arguments.device, found))}: {describe(found)}")
        return
    for threads in sorted(set(arguments.threads)) if arguments.device == "cpu" else [0]:
        label = f"{threads} thread(s)" if threads else arguments.device
        print(f"{label}: {describe(measure(arguments.device, threads or None))}", flush=True)


if __name__ == "__main__":
    main()
