"""What `../backends.py` registers as "triton": refuses, prepare, run."""

from __future__ import annotations

import importlib.util

import torch

from quantkit_kernels.triton.layout import build
from quantkit_kernels.triton.op import tickets, triton_linear

DTYPES = (torch.bfloat16, torch.float16)


def refuses(device: str, bits: int, group_size: int, symmetric: bool, n: int, k: int) -> str | None:
    """Why these kernels cannot run a scheme on a device, or None."""
    if device != "cuda":
        return f"the Triton kernels run on cuda, not on {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if group_size != k and group_size % 32:
        return f"groups must be a multiple of 32 or a whole row, not {group_size}"
    return None if 2 <= bits <= 8 else f"2 to 8 bits, not {bits}"


def by_row(device: torch.device) -> bool:
    """The order that a device's tensor cores want (`layout.py`)."""
    return (
        device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 10
    )


def prepare(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bits: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The layout (`layout.py`) for bf16 or fp16 activations, and `scheme`, an empty tensor of shape (bits, N, 0)."""
    codes, scales, zeros = build(packed, scale, zero_packed, bits, n, k, by_row(packed.device))
    if codes.device.type == "cuda":
        tickets(codes.device, 0)  # makes the ring, which a captured graph may not
    layout = {"codes": codes, "scales": scales, "scheme": codes.new_empty(bits, n, 0)}
    return layout if zeros is None else layout | {"zeros": zeros}


def run(x: torch.Tensor, layout: dict[str, torch.Tensor], group_size: int) -> torch.Tensor:
    """x [M, K] -> [M, N]."""
    bits, n, _ = layout["scheme"].shape
    return triton_linear(
        x, layout["codes"], layout["scales"], layout.get("zeros"), None, bits, group_size, n, x.shape[-1]
    )
