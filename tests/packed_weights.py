"""Random packed weights for the kernel tests, and what they stand for."""

from __future__ import annotations

import torch
from quantkit_kernels import Spec, Stored, pack_bits


def packed_weight(
    bits: int,
    n: int,
    k: int,
    group: int,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> tuple[Stored, torch.Tensor]:
    """(weight, W [N, K] in fp64) with extreme codes, negative scales and an all-zero group."""
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
    return stored(codes, scale, None if symmetric else zero, bits), w.view(n, k)


def stored(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int) -> Stored:
    """A weight from its codes uint8 [N, K], scale [N, K/G] and zero points uint8 [N, K/G]."""
    (n, k), groups = codes.shape, scale.shape[1]
    zero_packed = None if zero is None else pack_bits(zero.T.contiguous(), bits).T.contiguous()
    spec = Spec.integer(bits, k // groups, zero is None, n, k)
    return Stored(pack_bits(codes, bits), scale, zero_packed, spec)


def same(a: Stored, b: Stored) -> bool:
    """Whether two weights are the same, bit for bit."""
    mine, other = a.tensors(), b.tensors()
    return (
        a.spec == b.spec
        and mine.keys() == other.keys()
        and all(
            mine[name].dtype == other[name].dtype and torch.equal(mine[name], other[name]) for name in mine
        )
    )


def exact_weight(bits: int, n: int, k: int, group: int, symmetric: bool) -> Stored:
    """Stored tensors whose scales are powers of two, negative ones and zeros among them."""
    g = torch.Generator().manual_seed(bits * n + k)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g)
    scale = 2.0 ** -torch.randint(0, 3, (n, k // group), generator=g) * torch.randint(
        -1, 2, (n, k // group), generator=g
    )
    zero = None
    if not symmetric:
        zero = torch.randint(0, 2**bits, (k // group, n), dtype=torch.uint8, generator=g)
        zero = pack_bits(zero, bits).T.contiguous()
    return Stored(
        pack_bits(codes, bits), scale.to(torch.float16), zero, Spec.integer(bits, group, symmetric, n, k)
    )


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small integers: with them every sum of products is exact in fp32, in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()
