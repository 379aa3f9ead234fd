"""The backend "torch": PyTorch's own packed int4 and int8 products on the CPU, in the layouts they want."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantkit_kernels.backend import Backend
from quantkit_kernels.bits import unpack_bits
from quantkit_kernels.checks import check_part, check_product
from quantkit_kernels.stored import Layout, Spec, Stored

_INT4_GROUPS = (32, 64, 128, 256)
_COLUMNS = 256  # of the weight that a gradient writes out at a time


class AtenBackend(Backend):
    """4 bits in groups, and symmetric 8 bits with one scale per row."""

    name = "torch"

    def _refuses(self, spec: Spec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"PyTorch's packed int4 and int8 ops are used on the CPU only, not on {device.type}"
        if spec.bits == 4 and spec.integers:
            if spec.group_size not in _INT4_GROUPS:
                return f"the int4 op takes groups of 32, 64, 128 or 256, not {spec.group_size}"
            return None if spec.n % 16 == 0 else f"the int4 op needs N divisible by 16, got {spec.n}"
        if spec.bits == 8 and spec.integers and spec.symmetric and spec.group_size == spec.k:
            # torch 2.13's bf16 kernel reads past rows it cannot cut into vectors: wrong numbers, or a crash.
            return None if spec.k % 32 == 0 else f"the int8 op needs K divisible by 32, got {spec.k}"
        kind = "symmetric" if spec.symmetric else "asymmetric"
        what = f"{kind} {spec.bits} bits" if spec.integers else spec.number
        return f"PyTorch has int4 and symmetric per-channel int8, not {what} in groups of {spec.group_size}"

    def _prepare(self, stored: Stored, dtype: torch.dtype) -> Layout:
        build = _int4 if stored.spec.bits == 4 else _int8
        return Layout(build(stored, dtype), stored.spec, {})

    def linear(self, layout: Layout, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        spec = layout.spec
        check_product(x, bias, spec.n, spec.k, layout.tensors["codes"].device)
        _check(layout, x.dtype)
        rows = x.reshape(-1, spec.k).contiguous()
        wanted = torch.is_grad_enabled() and x.requires_grad
        y = _differentiable(rows, layout) if wanted else _product(rows, layout)
        y = y.view(*x.shape[:-1], spec.n)
        return y if bias is None else y + bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """PyTorch's op, which has no gradient formula, with the gradient of a linear layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        return _product(x, layout)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """dL/dy W, some columns of W at a time. The op's order of codes is private, so the op itself gives W."""
        k, pieces = ctx.layout.spec.k, []
        for start in range(0, k, _COLUMNS):
            columns = torch.zeros(min(_COLUMNS, k - start), k, dtype=grad.dtype)
            columns[:, start:].fill_diagonal_(1)
            pieces.append(grad @ _product(columns, ctx.layout).T)
        return torch.cat(pieces, -1), None


_differentiable: Callable[[torch.Tensor, Layout], torch.Tensor] = _Product.apply


def _check(layout: Layout, dtype: torch.dtype) -> None:
    """Raise ValueError for tensors that are not the weight's: PyTorch's ops do not look at all their sizes."""
    spec, tensors = layout.spec, layout.tensors
    device = torch.device("cpu")
    if "pairs" in tensors:
        check_part("codes", tensors["codes"], (spec.n, spec.k // 2), (torch.uint8,), device)
        check_part("pairs", tensors["pairs"], (spec.groups, spec.n, 2), (dtype,), device)
    else:
        check_part("codes", tensors["codes"], (spec.n, spec.k), (torch.int8,), device)
        check_part("scale", tensors["scale"], (spec.n,), (dtype,), device)


def _product(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """x [M, K] W^T."""
    tensors = layout.tensors
    if "pairs" in tensors:
        group = layout.spec.group_size
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, tensors["codes"], group, tensors["pairs"]
        )
    else:
        y = torch.ops.aten._weight_int8pack_mm(x, tensors["codes"], tensors["scale"])
    return y


def _int4(stored: Stored, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """codes: uint8 [N, K/2] in PyTorch's own order; pairs: `dtype` [K/G, N, 2].

    The op computes (q - 8) * pairs[..., 0] + pairs[..., 1]; (q - z) s is that with s and (8 - z) s.
    """
    codes = unpack_bits(stored.packed, 4, stored.spec.k).to(torch.int32)  # the conversion takes int32
    s = stored.scale.float()
    offset = torch.zeros_like(s)
    if stored.zero_packed is not None:
        offset = (8 - unpack_bits(stored.zero_packed.T, 4, stored.spec.n).T.float()) * s
    return {
        "codes": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2),
        "pairs": torch.stack([s, offset], -1).transpose(0, 1).to(dtype).contiguous(),
    }


def _int8(stored: Stored, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """codes: int8 [N, K]; scale: `dtype` [N]."""
    codes = unpack_bits(stored.packed, 8, stored.spec.k) ^ 128  # q - 128 as two's complement
    return {"codes": codes.view(torch.int8), "scale": stored.scale[:, 0].to(dtype).contiguous()}
