"""Which backend runs a packed linear, and the layouts other backends want.

A backend is a name, a test whether it can run a scheme on a device, and a function that builds its layout from the
stored tensors once at load. Only "auto" may fall back; a backend asked for by name that cannot run is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantkit_kernels.bits import unpack_bits


class BackendMissing(ValueError):
    """A backend was asked for by name and cannot run here."""


@dataclass(frozen=True)
class Choice:
    """The backend chosen and why."""

    name: str
    why: str


@dataclass(frozen=True)
class _Backend:
    """refuses(device type, bits, group_size, symmetric, n, k) -> reason or None; prepare(stored...) -> runner."""

    refuses: Callable[..., str | None]
    prepare: Callable[..., Callable[[torch.Tensor], torch.Tensor]] | None


def _torch_refuses(device: str, bits: int, group_size: int, symmetric: bool, n: int, k: int) -> str | None:
    if device != "cpu":
        return "PyTorch's packed int4/int8 ops are used on CPU only"
    if bits == 4:
        if group_size not in (32, 64, 128, 256):
            return f"the int4 op takes groups of 32, 64, 128 or 256, not {group_size}"
        return None if n % 16 == 0 else f"the int4 op needs N divisible by 16, got {n}"
    if bits == 8 and symmetric and group_size == k:
        return None
    return f"PyTorch has an int4 op and a symmetric per-channel int8 op, none for {bits} bits, group {group_size}"


def _torch_prepare(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """PyTorch's layouts: int4 as (q - 8) s + (8 - z) s with one (s, offset) pair per group; int8 per channel."""
    codes = unpack_bits(packed, bits, k)
    if bits == 8:
        signed = (codes.to(torch.int16) - 128).to(torch.int8)
        channel = scale[:, 0].to(dtype).contiguous()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, signed, channel)
    layout = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2)
    s = scale.float()
    offset = torch.zeros_like(s)
    if zero_packed is not None:
        offset = (8 - unpack_bits(zero_packed.T, bits, n).T.float()) * s
    pairs = torch.stack([s, offset], -1).transpose(0, 1).to(dtype).contiguous()  # (K/G, N, 2)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, layout, group_size, pairs)


BACKENDS: dict[str, _Backend] = {
    "reference": _Backend(lambda *_: None, None),
    "torch": _Backend(_torch_refuses, _torch_prepare),
}


def available(name: str) -> bool:
    """Whether a backend of this name exists in this installation."""
    return name in BACKENDS


def select(
    device: str, bits: int, group_size: int, symmetric: bool, m: int, n: int, k: int, backend: str | None = None
) -> Choice:
    """Which backend runs M x K activations on a packed [N, K] weight.

    backend: a name, or None for QUANTKIT_BACKEND or else "auto", which today is the reference. BackendMissing if a
    named backend is unknown or cannot run this scheme here.
    """
    wanted = backend or os.environ.get("QUANTKIT_BACKEND") or "auto"
    if wanted == "auto":
        return Choice("reference", "the default until a faster kernel is built")
    if wanted not in BACKENDS:
        raise BackendMissing(f"unknown backend {wanted!r}; known: auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[wanted].refuses(device, bits, group_size, symmetric, n, k)
    if reason:
        raise BackendMissing(f"backend {wanted!r} cannot run a {bits}-bit [{n}, {k}] weight: {reason}")
    return Choice(wanted, "asked for by name")


def prepare(
    name: str,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The runner x [M, K] -> [M, N] of a backend other than the reference, on a layout built from the stored tensors."""
    return BACKENDS[name].prepare(packed, scale, zero_packed, bits, group_size, n, k, dtype)
