"""AWQ (Lin et al. 2023): input channels that carry large activations are scaled up before rounding.

For linears fed by one x, W diag(s) is quantized and x / s is what they get; s = mean|x|^r, r searched on the output
error of the module that holds them. A transform: it returns ordinary weights, any algorithm may quantize them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantkit.numerics.grid import grouped, round_to_grid, scale_and_zero
from quantkit.numerics.range_search import search_grid
from quantkit.scheme import Grid

CLIP_STEPS = 10  # ranges 1.00, 0.95, ... 0.55 of the largest weight


@dataclass(frozen=True)
class ScaleSearch:
    """The scale found, [K]; the exponent (None = identity), and the loss with it and without scaling."""

    scale: torch.Tensor
    exponent: float | None
    loss: float
    identity_loss: float


def candidate(mean_abs: torch.Tensor, exponent: float) -> torch.Tensor:
    """s = mean|x|^r, floored at 1e-4 and centred so that sqrt(max s * min s) = 1; dead channels get 1."""
    s = mean_abs.pow(exponent).clamp(min=1e-4)
    s = s / (s.max() * s.min()).sqrt()
    return torch.where((mean_abs > 0) & torch.isfinite(s), s, torch.ones_like(s))


def rounded(weight: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """`weight` [N, K] on the plain min-max grid of `grid`."""
    scale, zero = search_grid(weight, grid, dtype)
    w = grouped(weight, grid.group(weight.shape[1]))
    return round_to_grid(w, scale[:, :, None], zero[:, :, None], grid.qmax).view(weight.shape)


def search_scale(
    mean_abs: torch.Tensor,
    expand: torch.Tensor | None,
    weights: list[torch.Tensor],
    grids: list[Grid],
    dtype: torch.dtype,
    loss: Callable[[list[torch.Tensor]], float],
    grid: int,
) -> ScaleSearch:
    """Search s for the consumers `weights` ([N, K] each).

    mean_abs: [channels]. expand: [K], the channel of each column (grouped value heads), None for one to one.
    loss: output error of the inspected module with these weights in place of the original ones.
    The identity is always a candidate, so the result is never worse on this loss.
    """

    def attempt(s: torch.Tensor) -> float:
        columns = s if expand is None else s[expand]
        return loss([rounded(w * columns, g, dtype) / columns for w, g in zip(weights, grids, strict=True)])

    identity = torch.ones_like(mean_abs)
    identity_loss = attempt(identity)
    best = ScaleSearch(identity, None, identity_loss, identity_loss)
    for step in range(1, grid):
        s = candidate(mean_abs, step / grid)
        value = attempt(s)
        if value < best.loss:
            best = ScaleSearch(s, step / grid, value, identity_loss)
    return best


def clip(weight: torch.Tensor, sample: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """Clamp each (row, group) of `weight` [N, K] to the range with the least error of its partial sum over `sample`.

    sample: inputs [tokens, K]. The error of a group is delta (X_g^T X_g) delta^T; no clipping is a candidate.
    """
    group = grid.group(weight.shape[1])
    x = sample.view(sample.shape[0], -1, group).transpose(0, 1)  # (K/G, tokens, G)
    gram = x.transpose(1, 2) @ x  # (K/G, G, G)
    w = grouped(weight, group)
    limit = w.abs().amax(2)  # (N, K/G)
    best, least = limit.clone(), torch.full_like(limit, torch.inf)
    for step in range(CLIP_STEPS):
        bound = limit * (1 - step / 20)
        clamped = w.clamp(-bound[:, :, None], bound[:, :, None])
        scale, zero = scale_and_zero(clamped.amin(2), clamped.amax(2), grid, dtype)
        off = (round_to_grid(clamped, scale[:, :, None], zero[:, :, None], grid.qmax) - w).transpose(0, 1)
        error = ((off @ gram) * off).sum(2).T  # (N, K/G)
        better = error < least
        best, least = torch.where(better, bound, best), torch.where(better, error, least)
    return w.clamp(-best[:, :, None], best[:, :, None]).reshape(weight.shape)
