"""Which backend runs a packed linear.

A backend is a name, a test whether it can run a scheme on a device, and, if the stored tensors do not suit
it, functions that build its layout once at load, run on it, and give the stored tensors back. Only "auto" may
fall back; a backend asked for by name that cannot run is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from quantkit_kernels.cpu import library, ops
from quantkit_kernels.layouts import Layout, torch_int4, torch_int8

ENVIRONMENT = "QUANTKIT_BACKEND"
COMPUTES = ("float", "int8", "int8-token")  # in the order of the native library's numbers
_INT4_GROUPS = (32, 64, 128, 256)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class BackendMissing(ValueError):
    """A backend was asked for by name and cannot run here."""


class Choice(NamedTuple):
    """The backend chosen and why."""

    name: str
    why: str


class _Backend(NamedTuple):
    """refuses(device type, bits, group_size, symmetric, n, k) -> reason or None; no `prepare`: runs as is.

    prepare(packed, scale, zero_packed, bits, n, k, dtype) -> Layout; run(x, layout, group_size, bias, compute);
    restore(layout) -> (packed, scale, zero_packed) exactly, where the layout keeps all of it.
    verdict(device, bits, group_size, symmetric, k, dtype) -> (whether "auto" may take it there, why).
    """

    refuses: Callable[[str, int, int, bool, int, int], str | None]
    prepare: Callable[..., Layout] | None = None
    run: Callable[..., torch.Tensor] | None = None
    restore: Callable[[Layout], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] | None = None
    computes: tuple[str, ...] = ("float",)
    verdict: Callable[..., tuple[bool, str]] | None = None


def _torch_refuses(device: str, bits: int, group_size: int, symmetric: bool, n: int, k: int) -> str | None:
    if device != "cpu":
        return f"PyTorch's packed int4 and int8 ops are used on the CPU only, not on {device}"
    if bits == 4:
        if group_size not in _INT4_GROUPS:
            return f"the int4 op takes groups of 32, 64, 128 or 256, not {group_size}"
        return None if n % 16 == 0 else f"the int4 op needs N divisible by 16, got {n}"
    if bits == 8 and symmetric and group_size == k:
        # torch 2.13's bf16 kernel reads past rows it cannot cut into vectors: wrong numbers, or a crash.
        return None if k % 32 == 0 else f"the int8 op needs K divisible by 32, got {k}"
    kind = "symmetric" if symmetric else "asymmetric"
    return (
        f"PyTorch has int4 and symmetric per-channel int8, not {kind} {bits} bits in groups of {group_size}"
    )


def _torch_prepare(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bits: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Layout:
    if dtype not in _FLOATS:
        raise BackendMissing(f"backend 'torch' takes fp32, bf16 or fp16 activations, not {dtype}")
    return (torch_int4 if bits == 4 else torch_int8)(packed, scale, zero_packed, n, k, dtype)


def _torch_run(
    x: torch.Tensor, layout: Layout, group_size: int, bias: torch.Tensor | None, compute: str
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if "pairs" in layout:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, layout["codes"], group_size, layout["pairs"])
    else:
        y = torch.ops.aten._weight_int8pack_mm(rows, layout["codes"], layout["scale"])
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias.to(y.dtype)


def _cpu_refuses(device: str, bits: int, group_size: int, symmetric: bool, n: int, k: int) -> str | None:
    if device != "cpu":
        return f"the native kernels run on the CPU, not on {device}"
    if not library.available():
        return "the native library was not built (no C++ compiler at install time)"
    try:
        library.isa()
    except RuntimeError as error:  # QUANTKIT_ISA names a path that cannot run: also "auto" must not go on
        raise BackendMissing(str(error)) from error
    return ops.refuses(bits, group_size, k)


def _cpu_prepare(packed, scale, zero_packed, bits: int, n: int, k: int, dtype: torch.dtype) -> Layout:
    if dtype not in _FLOATS:
        raise BackendMissing(f"backend 'cpu' takes fp32, bf16 or fp16 activations, not {dtype}")
    return ops.pack(packed, scale, zero_packed, bits, n, k)._asdict()


def _cpu_run(
    x: torch.Tensor, layout: Layout, group_size: int, bias: torch.Tensor | None, compute: str
) -> torch.Tensor:
    return ops.linear(
        x,
        layout["units"],
        None if bias is None else bias.float(),
        layout["bits"],
        group_size,
        layout["n"],
        layout["k"],
        layout["symmetric"],
        COMPUTES.index(compute),
        layout["scale_factor"],
        layout["wide_scales"],
    )


def _cpu_restore(layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return ops.unpack(ops.Packed(**layout))


def _triton_refuses(device: str, bits: int, group_size: int, symmetric: bool, n: int, k: int) -> str | None:
    from quantkit_kernels.triton import backend

    return backend.refuses(device, bits, group_size, symmetric, n, k)


def _triton_prepare(packed, scale, zero_packed, bits: int, n: int, k: int, dtype: torch.dtype) -> Layout:
    from quantkit_kernels.triton import backend

    if dtype not in backend.DTYPES:
        raise BackendMissing(f"backend 'triton' takes bf16 or fp16 activations, not {dtype}")
    return backend.prepare(packed, scale, zero_packed, bits, n, k, dtype)


def _triton_run(
    x: torch.Tensor, layout: Layout, group_size: int, bias: torch.Tensor | None, compute: str
) -> torch.Tensor:
    from quantkit_kernels.triton import backend

    return backend.run(x, layout, bias)


def _triton_restore(layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    from quantkit_kernels.triton import backend

    return backend.restored(layout)


def _triton_verdict(device: torch.device, *scheme) -> tuple[bool, str]:
    from quantkit_kernels.triton import selfcheck

    return selfcheck.verdict(device, *scheme)


_BACKENDS: dict[str, _Backend] = {
    "cpu": _Backend(_cpu_refuses, _cpu_prepare, _cpu_run, _cpu_restore, COMPUTES),
    "triton": _Backend(
        _triton_refuses, _triton_prepare, _triton_run, _triton_restore, verdict=_triton_verdict
    ),
    "torch": _Backend(_torch_refuses, _torch_prepare, _torch_run),
    "reference": _Backend(lambda *_: None),
}


def backends() -> tuple[str, ...]:
    """The names that `select` knows, "auto" aside."""
    return tuple(_BACKENDS)


def available(name: str) -> bool:
    """Whether a backend of this name exists in this installation."""
    return name in _BACKENDS


def select(
    device: str | torch.device,
    bits: int,
    group_size: int,
    symmetric: bool,
    m: int,
    n: int,
    k: int,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> Choice:
    """Which backend runs activations [M, K] on a packed [N, K] weight, and why.

    backend: a name, or "auto" or None for what QUANTKIT_BACKEND says, else the first of the native kernels,
    PyTorch's ops and the reference that can. On a GPU "auto" first compares the kernels with the reference, once per
    process, device and scheme (`triton/selfcheck.py`). dtype: of the activations; if None, nothing runs and the answer
    is what is known. BackendMissing if a named backend is unknown or cannot run this scheme here.
    """
    device = torch.device(device)
    forced = os.environ.get(ENVIRONMENT)
    wanted, why = (forced, f"{ENVIRONMENT} says so") if backend in (None, "auto") else (backend, "asked for")
    if wanted in (None, "", "auto"):
        if dtype not in (None, *_FLOATS):
            return Choice("reference", f"only the reference takes {dtype} activations")
        return _first(device, bits, group_size, symmetric, n, k, dtype)
    if wanted not in _BACKENDS:
        raise BackendMissing(f"unknown backend {wanted!r} ({why}); known: auto, {', '.join(_BACKENDS)}")
    reason = _BACKENDS[wanted].refuses(device.type, bits, group_size, symmetric, n, k)
    if reason:
        raise BackendMissing(
            f"backend {wanted!r} ({why}) cannot run a {bits}-bit [{n}, {k}] weight: {reason}; use 'reference'"
        )
    return Choice(wanted, why)


def _first(
    device: torch.device,
    bits: int,
    group_size: int,
    symmetric: bool,
    n: int,
    k: int,
    dtype: torch.dtype | None,
) -> Choice:
    reasons = []
    for name, backend in _BACKENDS.items():
        reason = backend.refuses(device.type, bits, group_size, symmetric, n, k)
        if reason is None:
            if backend.verdict is None:
                return Choice(name, "; ".join(reasons) or "the fastest that is built for this device")
            trusted, reason = backend.verdict(device, bits, group_size, symmetric, k, dtype)
            if trusted:
                return Choice(name, reason)
        reasons.append(f"not {name}: {reason}")
    raise AssertionError("the reference refuses nothing")


def prepare(
    name: str,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bits: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Layout | None:
    """The layout of a backend for activations of type `dtype`; None if it runs on the stored tensors."""
    build = _BACKENDS[name].prepare
    return build(packed, scale, zero_packed, bits, n, k, dtype) if build else None


def restore(name: str, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(packed, scale, zero_packed) as stored, exactly. BackendMissing if the layout does not keep all of it."""
    back = _BACKENDS[name].restore
    if back is None:
        raise BackendMissing(f"backend {name!r} keeps its own layout only, not what a checkpoint stores")
    return back(layout)


def check_compute(name: str, compute: str) -> None:
    """BackendMissing unless the backend can multiply this way.

    float: activations as they are. int8: activations rounded to int8 with one scale per token and group of columns;
    int8-token: one scale per token.
    """
    if compute not in COMPUTES:
        raise BackendMissing(f"unknown compute {compute!r}; known: {', '.join(COMPUTES)}")
    if compute not in _BACKENDS[name].computes:
        raise BackendMissing(f"backend {name!r} has no compute {compute!r}; only the native CPU kernels have")


def run(
    name: str,
    x: torch.Tensor,
    layout: Layout,
    group_size: int,
    bias: torch.Tensor | None = None,
    compute: str = "float",
) -> torch.Tensor:
    """x [..., K] -> [..., N] on a prepared layout; x has the dtype it was prepared for."""
    return _BACKENDS[name].run(x, layout, group_size, bias, compute)
