"""What `../backends.py` registers as "triton": refuses, prepare, run, restored."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from quantkit_kernels.triton.layout import build, restore
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
) -> dict[str, Any]:
    """The layout (`layout.py`) for bf16 or fp16 activations: codes, scales, zeros, bits, group_size, n, k."""
    codes, scales, zeros = build(packed, scale, zero_packed, bits, n, k, by_row(packed.device))
    if codes.device.type == "cuda":
        tickets(codes.device, 0)  # makes the ring, which a captured graph may not
    facts = {"bits": bits, "group_size": k // scale.shape[1], "n": n, "k": k}
    return {"codes": codes, "scales": scales} | ({} if zeros is None else {"zeros": zeros}) | facts


def run(x: torch.Tensor, layout: dict[str, Any], bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] -> [..., N]; bias [N] of any float type."""
    return triton_linear(x, *_arguments(layout, bias))


def restored(layout: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What `prepare` was given, bit for bit: packed, scale, zero_packed."""
    codes, scales, zeros, _, *facts = _arguments(layout, None)
    return restore(codes, scales, zeros, *facts)


def _arguments(layout: dict[str, Any], bias: torch.Tensor | None) -> tuple[Any, ...]:
    """Of the op, from codes on."""
    tensors = layout["codes"], layout["scales"], layout.get("zeros"), bias
    return *tensors, layout["bits"], layout["group_size"], layout["n"], layout["k"]
