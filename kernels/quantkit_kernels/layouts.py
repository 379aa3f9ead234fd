"""What a backend wants instead of the stored tensors: built once at load, never saved.

Every function takes packed int32 [N, ceil(K bits / 32)], scale [N, K/G], zero_packed int32 [ceil(N bits /
32), K/G] or None, the sizes and the dtype of the activations, and returns the tensors of the layout by name.
"""

from __future__ import annotations

from typing import Any

import torch

from quantkit_kernels.bits import unpack_bits

Layout = dict[str, Any]  # tensors by name, and plain values


def torch_int4(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Layout:
    """PyTorch's CPU int4 layout. codes: uint8 [N, K/2] in its own order; pairs: `dtype` [K/G, N, 2].

    The op computes (q - 8) * pairs[..., 0] + pairs[..., 1]; (q - z) s is that with s and (8 - z) s.
    """
    codes = unpack_bits(packed, 4, k).to(torch.int32)  # the conversion takes int32
    s = scale.float()
    offset = torch.zeros_like(s)
    if zero_packed is not None:
        offset = (8 - unpack_bits(zero_packed.T, 4, n).T.float()) * s
    return {
        "codes": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2),
        "pairs": torch.stack([s, offset], -1).transpose(0, 1).to(dtype).contiguous(),
    }


def torch_int8(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> Layout:
    """PyTorch's int8 layout, symmetric per channel. codes: int8 [N, K]; scale: `dtype` [N]."""
    codes = unpack_bits(packed, 8, k) ^ 128  # q - 128 as two's complement
    return {"codes": codes.view(torch.int8), "scale": scale[:, 0].to(dtype).contiguous()}
