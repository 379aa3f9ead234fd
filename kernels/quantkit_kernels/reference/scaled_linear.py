"""The plain-torch twin of products of 8-bit codes: rounding of inputs, and (qx - zx) sx times qw sw in exact sums.

int8: a range of 127.5 steps to each side of 0, halves to even (compressed-tensors). fp8: E4M3, 448 at most.
"""

from __future__ import annotations

import torch

CODES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
LARGEST = {"int8": 127.5, "fp8_e4m3": 448.0}


def quantize_inputs(x: torch.Tensor, number: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] and scales, fp32 [M, K/G], of x [M, K]: s = max|x| / LARGEST over `group` columns of a token.

    A group of zeros has the smallest normal scale, and zeros as codes.
    """
    parts = x.float().view(x.shape[0], -1, group)  # (M, K/G, G)
    scale = (parts.abs().amax(2) / LARGEST[number]).clamp_(min=torch.finfo(torch.float32).tiny)
    return encode(parts / scale[:, :, None], number).view(x.shape), scale


def quantize_inputs_by(
    x: torch.Tensor, number: str, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    """Codes [M, K] of x by one stored scale, fp32 [1], and zero point, int32 [1]."""
    levels = x.float() / scale
    return encode(levels if zero is None else levels + zero, number)


def encode(levels: torch.Tensor, number: str) -> torch.Tensor:
    """The codes nearest to numbers in units of the scale."""
    if number == "int8":
        return levels.round().clamp_(-128, 127).to(torch.int8)
    return levels.clamp(-LARGEST[number], LARGEST[number]).to(torch.float8_e4m3fn)


def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y [M, N] = sum over groups of sx sw sum (qx - zx) qw, plus bias, in `dtype`; computed in float64.

    x: codes [M, K]. x_scale: [M, K/G], or [1, 1] for all. x_zero: int32 [1] or None. w: codes [N, K].
    w_scale: [ceil(N/rows), K/G].
    """
    levels = x.to(torch.float64) - (0 if x_zero is None else x_zero)
    groups = w_scale.shape[1]
    sx = x_scale.to(torch.float64).expand(x.shape[0], groups).repeat_interleave(w.shape[1] // groups, 1)
    y = (levels * sx) @ dequantize(w, w_scale, rows, torch.float64).T
    return (y if bias is None else y + bias.double()).to(dtype)


def dequantize(w: torch.Tensor, w_scale: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """qw sw [N, K], computed in `dtype`."""
    n, k = w.shape
    scale = w_scale.to(dtype).repeat_interleave(rows, 0)[:n].repeat_interleave(k // w_scale.shape[1], 1)
    return w.to(dtype) * scale
