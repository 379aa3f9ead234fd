"""GPTQ's loops over the columns of weights: one pass that spreads each error, and sweeps that go over all again.

Matrices are transposed and stacked, [E, K, N] for E weights of one shape, each with a Hessian of its own (experts; E is
1 for a single weight): a column of W is then a contiguous row. All matrices of a weight are in one order of columns.
Inside the loops a weight is its level, its value in units of the scale, so that w_hat = level * scale.

Integers in fp32 go through the kernels of quantkit_kernels, a block of columns at once; the rest through torch's ops, a
column at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from quantkit_kernels.columns import MOST_COLUMNS, loops_for

from quantkit.numerics.grid import scale_and_zero
from quantkit.numerics.number import bounds, nearest
from quantkit.scheme import Grid, Number

BLOCK_BY_COLUMN = 32  # columns of a sweep that torch's ops take at once: each goes over all that follow


@dataclass
class ColumnGrid:
    """The grid of every column: scale and zero [E, G, N], and which of the G a column uses, int64 [E, K].

    global_scale: of two-level grids [E, 1].
    """

    scale: torch.Tensor
    zero: torch.Tensor
    group_of: torch.Tensor
    global_scale: torch.Tensor | None = None

    def of_columns(self, each: torch.Tensor) -> torch.Tensor:
        """What the columns [E, K, N] use of scales or zero points [E, G, N]."""
        return torch.stack([rows[groups] for rows, groups in zip(each, self.group_of, strict=True)])

    def values(self, levels: torch.Tensor) -> torch.Tensor:
        """w_hat [E, K, N] of levels."""
        return levels * self.of_columns(self.scale)


def solve(
    weight: torch.Tensor,
    factor: torch.Tensor,
    grids: ColumnGrid,
    grid: Grid,
    block: int,
    dynamic: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The column loop. weight: [E, K, N] in quantization order, overwritten. factor: of `inverse_factor` [E, K, K].

    Returns levels [E, K, N] and the scaled errors Err [E, K, N], for which
    tr((W - Q) H (W - Q)^T) = sum Err^2 holds exactly (H as damped).
    dynamic: dtype of the model, if a group's grid is to be taken from the weight as updated when it is reached.
    """
    k = weight.shape[1]
    group = grid.group(k)
    if dynamic is not None:
        block = group  # a group then never straddles a pending update
    loops = _loops(weight, grid.number)
    levels, errors = torch.empty_like(weight), torch.empty_like(weight)
    low, high = bounds(grids.zero, grid.number)
    used = grids.group_of.int()
    for start in range(0, k, block):
        end = min(start + block, k)
        if dynamic is not None:
            least, most = weight[:, start:end].amin(1), weight[:, start:end].amax(1)
            found = scale_and_zero(least, most, grid, dynamic, grids.global_scale)
            grids.scale[:, start // group], grids.zero[:, start // group] = found
            low, high = bounds(grids.zero, grid.number)
        step = min(end - start, loops.most)
        for a in range(start, end, step):
            b = min(a + step, end)
            upper = factor[:, k - b : k - a, k - b : k - a].flip(1, 2)
            at, groups = slice(a, b), used[:, a:b].contiguous()
            loops.spread(weight[:, at], upper, grids.scale, low, high, groups, levels[:, at], errors[:, at])
            if b < k:
                _add_product(
                    weight[:, b:], factor[:, k - b : k - a, : k - b].flip(1, 2).mT, errors[:, at], -1
                )
    return levels, errors


def sweep(
    target: torch.Tensor,
    hessian: torch.Tensor,
    levels: torch.Tensor,
    grids: ColumnGrid,
    grid: Grid,
    rounds: int,
    block: int | None = None,
    panel: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinate descent on tr(E H E^T), E = target - W_hat, over the `levels` [E, K, N], changed in place.

    With G = H E the best value of one entry, all others fixed, is w_hat + G_j / H_jj, rounded to its grid: no step can
    raise the objective. G is taken anew for every panel of columns and kept up to date inside it, block by block.
    Returns, per row of the weights [E, N], the codes changed and by how much the objective did (<= 0 but for rounding).
    """
    e, k, n = levels.shape
    loops = _loops(target, grid.number)
    block = block or loops.block
    low, high = bounds(grids.zero, grid.number)
    used = grids.group_of.int()
    value = grids.values(levels)
    error = target - value
    changed, gained = target.new_zeros(e, n), target.new_zeros(e, n)
    for _ in range(rounds):
        moved = target.new_zeros(e, n)
        for first in range(0, k, panel):
            last = min(first + panel, k)
            gradient = hessian[:, first:last] @ error
            before, slope = error[:, first:last].clone(), gradient.clone()
            for start in range(first, last, block):
                end = min(start + block, last)
                at, inside = slice(start, end), gradient[:, start - first : end - first]
                groups = used[:, at].contiguous()
                loops.descend(value[:, at], inside, hessian[:, at, start:end], grids.scale, low, high, groups)
                now = target[:, at] - value[:, at]
                _add_product(gradient, hessian[:, first:last, at], now - error[:, at], 1)
                error[:, at] = now
            moves = error[:, first:last] - before
            gained += slope.add_(gradient).mul_(moves).sum(1)
            moved += moves.count_nonzero(1)
        changed += moved
        if not bool(moved.any()):
            break
    of_columns = grids.of_columns(grids.scale)
    low, high = bounds(grids.of_columns(grids.zero), grid.number)
    levels.copy_(nearest(grid.number)(value.div_(of_columns), low, high))
    return changed, gained


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: int) -> None:
    """out += factor a b, of stacked matrices."""
    if len(out) == 1:  # a batch of one is slower
        out[0].addmm_(a[0], b[0], alpha=factor)
    else:
        out.baddbmm_(a, b, alpha=factor)


class _Loops(NamedTuple):
    """The loops over a block of columns, as kernels of quantkit_kernels have them: see quantkit_kernels.cpu.columns.

    most: columns that `spread` takes at most. block: columns that `descend` is given.
    """

    spread: Callable[..., None]
    descend: Callable[..., None]
    most: int
    block: int


def _loops(weight: torch.Tensor, number: Number) -> _Loops:
    kernels = loops_for(weight) if number.kind == "int" else None
    if kernels is not None:
        return _Loops(kernels.spread, kernels.descend, MOST_COLUMNS, MOST_COLUMNS)
    return _Loops(partial(_spread, number), partial(_descend, number), weight.shape[1], BLOCK_BY_COLUMN)


def _spread(
    number: Number,
    weight: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    groups: torch.Tensor,
    levels: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """`spread` of quantkit_kernels.cpu.columns for any number; the weight is changed."""
    round_ = nearest(number)
    for e, used in enumerate(groups.tolist()):
        pivots = upper[e].diagonal().tolist()
        for j, g in enumerate(used):
            w, s = weight[e, j], scale[e, g]
            level = round_(torch.div(w, s, out=levels[e, j]), low[e, g], high[e, g])
            error = torch.addcmul(w, level, s, value=-1, out=errors[e, j]).div_(pivots[j])
            weight[e, j + 1 :].addr_(upper[e, j, j + 1 :], error, alpha=-1)


def _descend(
    number: Number,
    value: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    groups: torch.Tensor,
) -> None:
    """`descend` of quantkit_kernels.cpu.columns for any number."""
    round_ = nearest(number)
    gradient = gradient.clone()
    for e, used in enumerate(groups.tolist()):
        for j, (g, pivot) in enumerate(zip(used, hessian[e].diagonal().tolist(), strict=True)):
            s, old = scale[e, g], value[e, j]
            new = torch.add(old, gradient[e, j], alpha=1 / pivot).div_(s)
            round_(new, low[e, g], high[e, g]).mul_(s)
            gradient[e, j + 1 :].addr_(hessian[e, j, j + 1 :], old.sub_(new))
            old.copy_(new)


def quadratic(hessian: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The diagonals [E, N] of W^T H W for w [E, K, N] and symmetric H [E, K, K], of which the upper tiles are read."""
    k = hessian.shape[1]
    tile = max(128, -(-k // 8))
    total = w.new_zeros(len(w), w.shape[2])
    for a in range(0, k, tile):
        b = a + tile
        total += (w[:, a:b] * (hessian[:, a:b, a:b] @ w[:, a:b])).sum(1)
        total += 2 * (w[:, a:b] * (hessian[:, a:b, b:] @ w[:, b:])).sum(1)
    return total
