"""Which backend runs a packed linear.

A backend is a name, a test whether it can run a scheme on a device, and, if the stored tensors do not suit
it, a function that builds its layout once at load and one that runs on it. Only "auto" may fall back; a
backend asked for by name that cannot run is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from quantkit_kernels.layouts import Layout, torch_int4, torch_int8

ENVIRONMENT = "QUANTKIT_BACKEND"
_INT4_GROUPS = (32, 64, 128, 256)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class BackendMissing(ValueError):
    """A backend was asked for by name and cannot run here."""


class Choice(NamedTuple):
    """The backend chosen and why."""

    name: str
    why: str


class _Backend(NamedTuple):
    """refuses(device type, bits, group_size, symmetric, n, k) -> reason or None; no `prepare`: runs as is."""

    refuses: Callable[[str, int, int, bool, int, int], str | None]
    prepare: Callable[..., Layout] | None = None
    run: Callable[[torch.Tensor, Layout, int], torch.Tensor] | None = None


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


def _torch_run(x: torch.Tensor, layout: Layout, group_size: int) -> torch.Tensor:
    if "pairs" in layout:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, layout["codes"], group_size, layout["pairs"])
    return torch.ops.aten._weight_int8pack_mm(x, layout["codes"], layout["scale"])


_BACKENDS: dict[str, _Backend] = {
    "reference": _Backend(lambda *_: None),
    "torch": _Backend(_torch_refuses, _torch_prepare, _torch_run),
}


def backends() -> tuple[str, ...]:
    """The names that `select` knows, "auto" aside."""
    return tuple(_BACKENDS)


def available(name: str) -> bool:
    """Whether a backend of this name exists in this installation."""
    return name in _BACKENDS


def select(
    device: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    m: int,
    n: int,
    k: int,
    backend: str | None = None,
) -> Choice:
    """Which backend runs activations [M, K] on a packed [N, K] weight, and why.

    backend: a name, or "auto" or None for what QUANTKIT_BACKEND says, else the reference. BackendMissing if a
    named backend is unknown or cannot run this scheme here.
    """
    forced = os.environ.get(ENVIRONMENT)
    wanted, why = (forced, f"{ENVIRONMENT} says so") if backend in (None, "auto") else (backend, "asked for")
    if wanted in (None, "", "auto"):
        return Choice("reference", "the default; no faster kernel is built")
    if wanted not in _BACKENDS:
        raise BackendMissing(f"unknown backend {wanted!r} ({why}); known: auto, {', '.join(_BACKENDS)}")
    reason = _BACKENDS[wanted].refuses(device, bits, group_size, symmetric, n, k)
    if reason:
        raise BackendMissing(
            f"backend {wanted!r} ({why}) cannot run a {bits}-bit [{n}, {k}] weight: {reason}; use 'reference'"
        )
    return Choice(wanted, why)


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


def run(name: str, x: torch.Tensor, layout: Layout, group_size: int) -> torch.Tensor:
    """x [M, K] -> [M, N] on a prepared layout; x has the dtype it was prepared for."""
    return _BACKENDS[name].run(x, layout, group_size)
