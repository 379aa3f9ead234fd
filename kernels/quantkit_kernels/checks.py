"""What the arguments of a product must be; native kernels trust sizes, so each is checked before it gets there."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch


def check_features(shape: torch.Size, k: int) -> None:
    """Raise ValueError unless the last dimension of x is K."""
    if not shape or shape[-1] != k:
        raise ValueError(f"x has {shape[-1] if shape else 0} features, the weight takes {k}")


def check_product(x: torch.Tensor, bias: torch.Tensor | None, n: int, k: int, device: torch.device) -> None:
    """Raise ValueError or TypeError unless x [..., K] and bias [N] (or None) are floats on the weight's device."""
    check_features(x.shape, k)
    if not x.is_floating_point():
        raise TypeError(f"x must be of a float type, got {x.dtype}")
    if bias is not None and (bias.shape != (n,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be [{n}] of a float type, got {bias.dtype} {list(bias.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the weight on {device}; move them to one device")


def check_slots(x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, experts: int, k: int) -> None:
    """Raise ValueError unless x is [T, K], rows int64 [S] and offsets int64 [experts + 1], beside it and contiguous."""
    if x.dim() != 2:
        raise ValueError(f"x of experts is [T, {k}], got {list(x.shape)}")
    check_features(x.shape, k)
    check_part("rows", rows, (rows.numel(),), (torch.int64,), x.device)
    check_part("offsets", offsets, (experts + 1,), (torch.int64,), x.device)


def check_part(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int],
    dtypes: Collection[torch.dtype],
    device: torch.device,
) -> None:
    """Raise ValueError unless a tensor is contiguous, of this shape, of one of these types and on this device."""
    if tensor.shape != tuple(shape) or tensor.dtype not in dtypes or not tensor.is_contiguous():
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(
            f"{name} must be contiguous {wanted} {list(shape)}, got {tensor.dtype} {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got a tensor on {tensor.device}; move it there")


def check_float(dtype: torch.dtype) -> None:
    """Raise TypeError unless a dtype that was asked for is a float type."""
    if not dtype.is_floating_point:
        raise TypeError(f"a weight is written out in a float type, not in {dtype}")
