"""Which kernel each kind of layer will get when the checkpoint is loaded by quantkit; without torch.

The rules of `quantkit_kernels.select` over scheme and shape, as a table: tests/cost/test_kernels.py compares it with
what is selected. What only the device itself can tell, the self-tests of its kernels, is not known here.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.cost.model import Linears
from quantkit.scheme import Grid, Scheme

_BITS = (2, 3, 4, 8)  # of the native kernels
_TABLES = ("nf4", "fp8_e4m3", "fp4_e2m1")
_ATEN_GROUPS = (32, 64, 128, 256)
# Instructions that each path of the native kernels needs, the fastest last (kernels/quantkit_kernels/cpu/dispatch.cpp).
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"}
_PATHS = {"avx2": _AVX2, "avx512": _AVX512, "amx": _AVX512 | {"amx_tile", "amx_int8", "amx_bf16"}}


@dataclass(frozen=True)
class Kernel:
    """device: "cpu" or "cuda". backend: as `quantkit kernels` names it. path: instructions that it uses, "" if unknown.
    inputs: how it rounds them itself; None: they are rounded before it, if at all. why: it is not the first choice.
    """

    device: str
    backend: str
    path: str = ""
    inputs: str | None = None
    why: str = ""

    def __str__(self) -> str:
        inside = ", ".join(filter(None, (self.path, self.inputs and f"inputs {self.inputs}")))
        return self.backend + (f" ({inside})" if inside else "") + (f": {self.why}" if self.why else "")

    def report(self) -> dict[str, Any]:
        return asdict(self)


def kernel_for(scheme: Scheme, shape: tuple[int, int], device: str = "cpu") -> Kernel:
    """What `load` will choose for a linear [N, K] on a kind of device, as far as scheme and shape decide it."""
    refuse, native, path = (_native, "cpu", _path()) if device == "cpu" else (_triton, "triton", "")
    inputs = _inputs(scheme.inputs, scheme.weights, device)
    why = refuse(scheme.weights, shape)
    if why is None:
        return Kernel(device, native, path, inputs)
    if device == "cpu" and _aten(scheme.weights, shape):
        return Kernel(device, "torch", why=why)
    return Kernel(device, "reference", why=why)


def kernels_of(linears: Iterable[Linears]) -> list[dict[str, Any]]:
    """The kernels of all planned kinds of linears, on a CPU and on a GPU: name, shape, scheme, kernels."""
    return [
        {
            "name": one.name,
            "shape": list(one.shape),
            "scheme": str(one.scheme),
            "count": one.count,
            "kernels": [kernel_for(one.scheme, one.shape, device).report() for device in ("cpu", "cuda")],
        }
        for one in linears
        if one.scheme is not None
    ]


def _native(grid: Grid, shape: tuple[int, int]) -> str | None:
    """Why the native kernels do not take a weight, or None."""
    k, number = shape[1], grid.number
    size = grid.group(k)
    if not _library():
        return "the native library is not built"
    if number.kind != "int" and number.name not in _TABLES:
        return f"the native kernels have no table of {number.name}"
    if grid.bits not in _BITS:
        return f"the native kernels take 2, 3, 4 and 8 bits, not {grid.bits}"
    small = (16, 32, 64) if number.name == "fp4_e2m1" else (32, 64)
    if size != k and size not in small and size % 128:
        return f"the native kernels take no groups of {size}"
    return None


def _aten(grid: Grid, shape: tuple[int, int]) -> bool:
    """Whether PyTorch's packed products on the CPU take a weight."""
    n, k = shape
    if grid.number.kind != "int":
        return False
    if grid.bits == 4:
        return grid.group(k) in _ATEN_GROUPS and n % 16 == 0
    return grid.bits == 8 and grid.symmetric and grid.group(k) == k and k % 32 == 0


def _triton(grid: Grid, shape: tuple[int, int]) -> str | None:
    """Why the Triton kernels do not take a weight, or None."""
    k = shape[1]
    if grid.number.kind != "int" and grid.number.name != "fp8_e4m3":
        return f"the Triton kernels take integers and FP8, not {grid.number.name}"
    size = grid.group(k)
    return f"the Triton kernels take no groups of {size}" if size != k and size % 32 else None


def _inputs(inputs: Grid | None, weights: Grid, device: str) -> str | None:
    """How a kernel rounds the inputs itself; None if they are rounded before it, or not at all."""
    if inputs is None:
        return None
    by_token = (
        inputs.dynamic and inputs.symmetric and inputs.granularity == "token" and inputs.group_size is None
    )
    stored = not inputs.dynamic and inputs.granularity == "tensor"
    name, found = inputs.number.name, None
    if name == "int8" and weights.number.kind == "int" and (by_token or stored):
        found = "int8-range"
    elif name == "fp8_e4m3" and (by_token or stored):
        found = "fp8-range"
    elif name == "fp8_e4m3" and inputs.dynamic and inputs.group_size == 128:
        found = "fp8-group"
    if device == "cpu" or found is None:
        return found
    wanted = {"int8-range": ("int8", None), "fp8-range": ("fp8_e4m3", None), "fp8-group": ("fp8_e4m3", 128)}[
        found
    ]
    same = (weights.number.name, weights.group_size) == wanted and weights.symmetric
    return found if same else None


def _library() -> bool:
    """Whether the native library was built; it lies beside the kernels' code."""
    if named := os.environ.get("QUANTKIT_CPU_LIBRARY"):
        return Path(named).is_file()
    spec = importlib.util.find_spec("quantkit_kernels")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return any(next(Path(place).joinpath("cpu").glob("_quantkit_cpu*.so"), None) for place in places)


def _path() -> str:
    """The instructions that the native kernels will use: what QUANTKIT_ISA names, or the best of this processor."""
    if forced := os.environ.get("QUANTKIT_ISA"):
        return forced
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    flags = next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")), "")
    have = set(flags.split())
    return next((name for name, needed in reversed(_PATHS.items()) if needed <= have), "portable")


__all__ = ["Kernel", "kernel_for", "kernels_of"]
