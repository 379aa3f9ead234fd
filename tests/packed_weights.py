"""Random packed weights for the kernel tests, and what they stand for."""

from __future__ import annotations

import torch
from quantkit_kernels import pack_bits


def packed_weight(
    bits: int,
    n: int,
    k: int,
    group: int,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(packed, scale, zero_packed, W [N, K] in fp64) with extreme codes, negative scales and an all-zero group."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g)
    codes[0] = 2**bits - 1
    codes[1] = 0
    scale = (torch.randn(n, k // group, generator=g) * 0.05).to(scale_dtype)
    scale[0, 0] = 0
    zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zero = torch.randint(0, 2**bits, zero.shape, dtype=torch.uint8, generator=g)
    w = (codes.double().view(n, -1, group) - zero.double()[:, :, None]) * scale.double()[:, :, None]
    zero_packed = None if symmetric else pack_bits(zero.T.contiguous(), bits).T.contiguous()
    return pack_bits(codes, bits), scale, zero_packed, w.view(n, k)
