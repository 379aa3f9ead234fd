"""The backend "triton": weight-only linears on CUDA and ROCm devices."""

from __future__ import annotations

import importlib.util

import torch

from quantkit_kernels.backend import Backend, Verdict
from quantkit_kernels.stored import Layout, Spec, Stored
from quantkit_kernels.triton.launch import DTYPES, tickets
from quantkit_kernels.triton.layout import build, reads_by_row, restore
from quantkit_kernels.triton.op import triton_linear
from quantkit_kernels.triton.selfcheck import verdict


class TritonBackend(Backend):
    """2 to 8 bits in groups that are a multiple of 32, or one scale per row."""

    name = "triton"
    dtypes = DTYPES

    def _refuses(self, spec: Spec, device: torch.device) -> str | None:
        return refuses(spec, device)

    def verdict(self, spec: Spec, device: torch.device, dtype: torch.dtype | None) -> Verdict:
        return verdict(spec, device, dtype)

    def _prepare(self, stored: Stored, dtype: torch.dtype) -> Layout:
        """Tensors `codes`, `scales` and, with zero points, `zeros` (`layout.py`)."""
        codes, scales, zeros = build(stored, reads_by_row(stored.device))
        if codes.device.type == "cuda":
            tickets(codes.device, 0)  # makes the ring, which a captured graph may not
        tensors = {"codes": codes, "scales": scales} | ({} if zeros is None else {"zeros": zeros})
        return Layout(tensors, stored.spec, {})

    def linear(self, layout: Layout, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tensors, spec = layout.tensors, layout.spec
        parts = (tensors["codes"], tensors["scales"], tensors.get("zeros"))
        return triton_linear(x, *parts, bias, spec.bits, spec.group_size, spec.n, spec.k)

    def restore(self, layout: Layout) -> Stored:
        tensors = layout.tensors
        return restore(tensors["codes"], tensors["scales"], tensors.get("zeros"), layout.spec)


def refuses(spec: Spec, device: torch.device) -> str | None:
    """Why these kernels cannot run a weight on a device, or None."""
    if device.type != "cuda":
        return f"the Triton kernels run on cuda, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not spec.integers:
        return f"the Triton kernels take integer codes, not {spec.number}"
    if spec.group_size != spec.k and spec.group_size % 32:
        return f"groups must be a multiple of 32 or a whole row, not {spec.group_size}"
    return None
