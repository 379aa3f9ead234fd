"""GPTQ's loops over the columns of a weight: one pass that spreads each error, and sweeps that go over all again.

Matrices are transposed, [K, N]: a column of W is then a contiguous row. All of a matrix is in one order of columns.
Inside the loops a weight is its level, its value in units of the scale, so that w_hat = level * scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.numerics.grid import scale_and_zero
from quantkit.numerics.number import bounds, nearest
from quantkit.scheme import Grid, Number


@dataclass
class ColumnGrid:
    """The grid of every column: rows [G, N] of scales and zero points, and which of them a column uses.

    global_scale: of a two-level grid.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    group_of: list[int]
    global_scale: torch.Tensor | None = None

    def values(self, levels: torch.Tensor) -> torch.Tensor:
        """w_hat [K, N] of levels."""
        return levels * self.scale[self.group_of]


def solve(
    weight: torch.Tensor,
    factor: torch.Tensor,
    grids: ColumnGrid,
    grid: Grid,
    block: int,
    dynamic: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The column loop. weight: [K, N] in quantization order, overwritten. factor: of `inverse_factor`, same order.

    Returns levels [K, N] and the scaled errors Err [K, N], for which
    tr((W - Q) H (W - Q)^T) = sum Err^2 holds exactly (H as damped).
    dynamic: dtype of the model, if a group's grid is to be taken from the weight as updated when it is reached.
    """
    k = weight.shape[0]
    group, round_ = grid.group(k), nearest(grid.number)
    if dynamic is not None:
        block = group  # a group then never straddles a pending update
    out = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    for start in range(0, k, block):
        end = min(start + block, k)
        if dynamic is not None:
            lo, hi = weight[start:end].amin(0), weight[start:end].amax(0)
            found = scale_and_zero(lo, hi, grid, dynamic, grids.global_scale)
            grids.scale[start // group], grids.zero[start // group] = found
        low, high = bounds(grids.zero, grid.number)
        back = slice(k - end, k - start)
        u = factor[back, back].flip(0, 1)
        pivots = u.diagonal().tolist()
        for i in range(start, end):
            j, g = i - start, grids.group_of[i]
            w, scale = weight[i], grids.scale[g]
            level = round_(torch.div(w, scale, out=out[i]), low[g], high[g])
            error = torch.addcmul(w, level, scale, value=-1, out=errors[i]).div_(pivots[j])
            weight[i + 1 : end].addr_(u[j, j + 1 :], error, alpha=-1)
        if end < k:
            weight[end:].addmm_(factor[back, : k - end].flip(0, 1).T, errors[start:end], alpha=-1)
    return out, errors


def sweep(
    target: torch.Tensor,
    hessian: torch.Tensor,
    levels: torch.Tensor,
    grids: ColumnGrid,
    grid: Grid,
    rounds: int,
    block: int = 32,
    panel: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinate descent on tr(E H E^T), E = target - W_hat, over the `levels` [K, N], changed in place.

    With G = H E the best value of one entry, all others fixed, is w_hat + G_j / H_jj, rounded to its grid: no step can
    raise the objective. G is taken anew for every panel of columns and kept up to date inside it. Returns, per
    row of the weight [N], the codes changed and by how much the objective did (<= 0 but for rounding).
    """
    k = levels.shape[0]
    value = grids.values(levels)
    error = target - value
    changed, gained = target.new_zeros(target.shape[1]), target.new_zeros(target.shape[1])
    for _ in range(rounds):
        moved = target.new_zeros(target.shape[1])
        for first in range(0, k, panel):
            last = min(first + panel, k)
            gradient = hessian[first:last] @ error
            before, slope = error[first:last].clone(), gradient.clone()
            for start in range(first, last, block):
                end = min(start + block, last)
                inside = gradient[start - first : end - first].clone()
                _descend(value[start:end], inside, hessian[start:end, start:end], start, grids, grid.number)
                now = target[start:end] - value[start:end]
                gradient.addmm_(hessian[first:last, start:end], now - error[start:end])
                error[start:end] = now
            moves = error[first:last] - before
            gained += slope.add_(gradient).mul_(moves).sum(0)
            moved += moves.count_nonzero(0)
        changed += moved
        if not bool(moved.any()):
            break
    low, high = bounds(grids.zero[grids.group_of], grid.number)
    levels.copy_(nearest(grid.number)(value.div_(grids.scale[grids.group_of]), low, high))
    return changed, gained


def _descend(
    value: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    at: int,
    grids: ColumnGrid,
    number: Number,
) -> None:
    """One step for every column of a block, in order. value, gradient [B, N]: changed; `at`: its first column."""
    low, high = bounds(grids.zero, number)
    round_ = nearest(number)
    for j, pivot in enumerate(hessian.diagonal().tolist()):
        g = grids.group_of[at + j]
        scale, old = grids.scale[g], value[j]
        new = torch.add(old, gradient[j], alpha=1 / pivot).div_(scale)
        round_(new, low[g], high[g]).mul_(scale)
        gradient[j + 1 :].addr_(hessian[j, j + 1 :], old.sub_(new))
        old.copy_(new)


def quadratic(hessian: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The diagonal [N] of W^T H W for w [K, N] and a symmetric H [K, K], whose tiles on and above its own are read."""
    k = len(hessian)
    tile = max(128, -(-k // 8))
    total = w.new_zeros(w.shape[1])
    for a in range(0, k, tile):
        b = a + tile
        total += (w[a:b] * (hessian[a:b, a:b] @ w[a:b])).sum(0)
        total += 2 * (w[a:b] * (hessian[a:b, b:] @ w[b:])).sum(0)
    return total
