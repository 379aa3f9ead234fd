"""What calibration knows about the input of one linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Statistics:
    """Statistics over the calibration tokens of one linear's input x [tokens, K]; a field not asked for is None.

    hessian: H = 2/tokens * sum x xT, fp32 [K, K] (of the quantized prefix when that stream exists).
    drift:   D = 2/tokens * sum (x_full - x) xT, fp32 [K, K], for re-targeting.
    fired: bool [K], whether the input was ever nonzero; comes with the hessian, whose squares may underflow.
    amax, mean_abs, mean_square: fp32 [K].
    sample: fp32 [rows, K], some of the inputs themselves.
    tokens: number of (unmasked) tokens seen.
    """

    tokens: int = 0
    hessian: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    fired: torch.Tensor | None = None
    amax: torch.Tensor | None = None
    mean_abs: torch.Tensor | None = None
    mean_square: torch.Tensor | None = None
    sample: torch.Tensor | None = None
