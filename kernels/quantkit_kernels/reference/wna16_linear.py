"""The plain-torch twin of every weight-only linear kernel: dequantize, then one matmul."""

from __future__ import annotations

import torch

from quantkit_kernels.bits import unpack_bits
from quantkit_kernels.checks import check_float, check_product
from quantkit_kernels.stored import Stored
from quantkit_kernels.tables import table

_ELEMENTS = 1 << 20  # weights dequantized at a time, so that the fp32 temporaries stay in cache


def dequantize(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """(q - z) * s in fp32 (fp64 for fp64), cast to `dtype`: [N, K]. Without zeros z = 2^(bits-1).

    Of numbers that are no integers, value of the code * s.
    """
    spec = stored.spec
    check_float(dtype)
    n, k, bits = spec.n, spec.k, spec.bits
    work = torch.float64 if dtype == torch.float64 else torch.float32
    zero = None if stored.zero_packed is None else unpack_bits(stored.zero_packed.T, bits, n).T  # (N, K/G)
    out = torch.empty(n, k, dtype=dtype, device=stored.device)
    step = max(1, _ELEMENTS // k)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        codes = unpack_bits(stored.packed[rows], bits, k).view(
            -1, spec.groups, spec.group_size
        )  # (rows, K/G, G)
        if spec.integers:
            q = codes.to(work)
            q -= 2 ** (bits - 1) if zero is None else zero[rows].to(work)[:, :, None]
        else:
            q = table(spec.number, work, stored.device)[codes.int()]
        q *= stored.scale[rows].to(work)[:, :, None]
        out[rows] = q.view(-1, k)
    return out


def wna16_linear(x: torch.Tensor, stored: Stored, bias: torch.Tensor | None) -> torch.Tensor:
    """y = x W^T + bias for packed W [N, K]; x [..., K] -> [..., N] in x's dtype."""
    check_product(x, bias, stored.spec.n, stored.spec.k, stored.device)
    w = dequantize(stored, x.dtype)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
