"""The Hadamard rotation: it spreads an outlier channel over all channels and leaves inner products as they are."""

from __future__ import annotations

import torch


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., d] times the orthonormal d x d Sylvester-Hadamard matrix, which is its own inverse, in x's dtype.

    Computed in fp32, by d log d additions. ValueError unless d is a power of two.
    """
    d = x.shape[-1]
    if d < 1 or d & (d - 1):
        raise ValueError(f"a Hadamard rotation needs a power of two of channels, got {d}")
    out: torch.Tensor = x.float()
    half = 1
    while half < d:
        left, right = out.unflatten(-1, (d // (2 * half), 2, half)).unbind(-2)  # (..., d / 2 half, half)
        out = torch.stack((left + right, left - right), -2).flatten(-3)
        half *= 2
    scaled: torch.Tensor = out * d**-0.5
    return scaled.to(x.dtype)
