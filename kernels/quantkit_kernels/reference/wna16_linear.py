"""The plain-torch twin of every weight-only linear kernel: dequantize, then one matmul."""

from __future__ import annotations

import torch

from quantkit_kernels.bits import unpack_bits

_ELEMENTS = 1 << 20  # weights dequantized at a time, so that the fp32 temporaries stay in cache


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bits: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(q - z) * s in fp32 (fp64 for fp64), cast to `dtype`: [N, K]. Without zeros z = 2^(bits-1)."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    groups = scale.shape[1]
    zero = None if zero_packed is None else unpack_bits(zero_packed.T, bits, n).T  # (N, K/G)
    out = torch.empty(n, k, dtype=dtype, device=packed.device)
    step = max(1, _ELEMENTS // k)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        q = unpack_bits(packed[rows], bits, k).view(-1, groups, k // groups).to(work)  # (rows, K/G, G)
        q -= 2 ** (bits - 1) if zero is None else zero[rows].to(work)[:, :, None]
        q *= scale[rows].to(work)[:, :, None]
        out[rows] = q.view(-1, k)
    return out


def wna16_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    n: int,
    k: int,
) -> torch.Tensor:
    """y = x W^T + bias for packed W [N, K]; x [..., K] -> [..., N] in x's dtype."""
    w = dequantize(packed, scale, zero_packed, bits, n, k, x.dtype)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
