"""Where a grid should end: the plain range of a group, or the shrunken one with the least rounding error.

`mse`: for p in 1, 0.98, ... the range (p lo, p hi) with the least sum |w - w_hat|^2.5;
`weighted`: the same with each column's error weighted by E[x^2] (llama.cpp's imatrix, llm-compressor's imatrix_mse).
Floats are tried with wider ranges too: their levels are not equidistant, so that a group may fit better if its largest
weight takes 4 of FP4 instead of 6. Scales of one byte are tried as they are stored: the FP8 numbers around that of the
plain range, for several global scales; the neighbouring powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from quantkit_kernels.cpu import library
from quantkit_kernels.cpu.range_errors import range_errors

from quantkit.numerics.grid import (
    abs_max_global,
    grouped,
    scale_and_zero,
    to_stored,
)
from quantkit.numerics.number import bounds, nearest
from quantkit.numerics.statistics import neutral
from quantkit.scheme import Grid

STRIDE = 0.02
STEPS = {2: 35, 3: 28, 4: 20}  # shrink factors tried, STRIDE apart: fewer bits clip deeper
STEPS_WIDE = 12
WIDER = (2**0.125, 2**0.25, 2**0.375, 2**0.5, 2**0.625, 2**0.75, 2**0.875)  # also tried for floats
EXPONENTS = (1.0, 0.5, 2.0, 0.25)  # tried for scales that are powers of two
FP8_STEPS = tuple(step for step in range(-7, 7) if step)  # FP8 numbers around that of the plain range
GLOBALS = 8  # global scales tried, over one octave
_GLOBAL_SAMPLE = 1 << 18  # weights that a global scale is chosen on
_CHUNK = 1 << 17  # elements per pass, so that the temporaries stay in the second-level cache
_WORTH_GATHERING = 0.6  # share of the groups up to which copying them out costs less than trying all
_POWER = 2.5  # of `mse`
_SMALL = 1e-30  # sums between this and its inverse are far from where fp32 ends
_ALIGNED = 64  # groups: torch's vectors take a multiple of this without a rest
_LAST_FP8 = 126  # the code of 448
_SURE = 0.99  # a lower bound of an error is taken this much lower, for rounding


def search_grid(
    weight: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    method: str = "minmax",
    importance: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of every group of `weight` [N, K]: two float tensors [N, K/G].

    dtype: the model's, in which scales are stored if the grid says nothing else. method: minmax | mse | weighted;
    `weighted` needs importance [K] >= 0, where 0 means that nothing is known and counts as the mean. global_scale: of
    a two-level grid, from `search_global`; None: the one of the largest weight. Rows that share a scale have the same.
    """
    n, k = weight.shape
    group = grid.group(k)
    if grid.two_level and global_scale is None:
        global_scale = search_global(weight, grid, "minmax")
    if method == "minmax":
        lo, hi = _ranges(weight, grid)
        return scale_and_zero(lo, hi, grid, dtype, global_scale)
    column = _columns(weight, grid, method, importance)
    if grid.granularity == "tensor":
        return _search_whole(weight, grid, dtype, column)
    if grid.granularity == "block":
        return _search_blocks(weight, grid, dtype, column)
    if grid.two_level:
        parts = [
            _search(chunk.reshape(-1, group), grid, dtype, column, global_scale)
            for chunk in torch.split(weight, chunk_rows(k))
        ]
        scale, zero = (torch.cat([part[i] for part in parts]).view(n, k // group) for i in (0, 1))
        return scale, zero
    search = _search_natively if _is_native(weight, grid, group) else _search
    parts = [
        search(chunk.reshape(-1, group), grid, dtype, column) for chunk in torch.split(weight, chunk_rows(k))
    ]
    scale, zero = (torch.cat([part[i] for part in parts]).view(n, k // group) for i in (0, 1))
    return scale, zero


def search_global(
    weight: torch.Tensor, grid: Grid, method: str = "minmax", importance: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The global scale, fp32 [1], of a two-level grid for `weight` [N, K]; None for another grid.

    minmax: the largest group gets the largest FP8 scale. Else the one, among GLOBALS smaller by up to an octave, with
    which the groups of a sample of rows have the least error, each with its best scale.
    """
    if not grid.two_level:
        return None
    lo, hi = weight.aminmax()
    return chosen_global(
        torch.maximum(-lo, hi), weight[:: global_stride(*weight.shape)], grid, method, importance
    )


def global_stride(n: int, k: int) -> int:
    """Of a weight [N, K], every so manieth row is in the sample on which its global scale is chosen."""
    return max(1, n * k // _GLOBAL_SAMPLE)


def chosen_global(
    span: torch.Tensor,
    sample: torch.Tensor,
    grid: Grid,
    method: str = "minmax",
    importance: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """`search_global` of a weight that is not whole in memory.

    span: its largest |w|; sample: its rows by `global_stride`.
    """
    plain = abs_max_global(span, grid)
    if method == "minmax" or plain is None:
        return plain
    w = sample.reshape(-1, grid.group(sample.shape[1]))
    column = _columns(sample, grid, method, importance)
    columns = None if column is None else column.repeat(len(w) // len(column), 1)
    best, least = plain, math.inf
    for step in range(GLOBALS):
        candidate = plain * 2 ** (-step / GLOBALS)
        scale, zero = _search(w, grid, sample.dtype, column, candidate)
        error = float(
            (_in_steps(w, scale, zero, grid, columns) * _step(scale, columns)).sum(dtype=torch.float64)
        )
        if error < least:
            best, least = candidate, error
    return best


def chunk_rows(k: int) -> int:
    """Rows that are searched at once; a weight searched in multiples of them gets the bits that it gets whole."""
    return max(1, _CHUNK // k)


def _columns(
    weight: torch.Tensor, grid: Grid, method: str, importance: torch.Tensor | None
) -> torch.Tensor | None:
    """The weights of the columns (K/G, G) for `weighted`, None for `mse`."""
    if method != "weighted":
        return None
    if importance is None:
        raise ValueError("range search 'weighted' needs the mean square of the inputs")
    return neutral(importance.to(weight.dtype)).reshape(-1, grid.group(weight.shape[1])).contiguous()


def _ranges(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight [N, K/G] among those that have a scale in common with each row's groups."""
    n, k = weight.shape
    w = grouped(weight, grid.group(k))
    lo, hi = w.amin(2), w.amax(2)
    rows = grid.rows(n)
    if rows == 1:
        return lo, hi
    lo = torch.cat([part.amin(0, keepdim=True).expand(len(part), -1) for part in lo.split(rows)])
    hi = torch.cat([part.amax(0, keepdim=True).expand(len(part), -1) for part in hi.split(rows)])
    return lo, hi


def _search_whole(
    weight: torch.Tensor, grid: Grid, dtype: torch.dtype, column: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero [N, 1] of a weight with one scale: the range with the least error of all of it."""
    n, k = weight.shape
    lo, hi = (each.reshape(1) for each in weight.aminmax())
    found = [scale_and_zero(lo * shrink, hi * shrink, grid, dtype) for shrink in _shrinks(grid)]
    errors = []
    for scale, zero in found:
        error = torch.zeros((), dtype=torch.float64, device=weight.device)
        for chunk in torch.split(weight, chunk_rows(k)):
            s, z = scale.expand(len(chunk)), zero.expand(len(chunk))
            columns = None if column is None else column.expand(len(chunk), -1)
            error += _in_steps(chunk, s, z, grid, columns).sum(dtype=torch.float64)
        errors.append(float(error * _step(scale, column)))
    scale, zero = found[errors.index(min(errors))]
    return scale.expand(n, 1).contiguous(), zero.expand(n, 1).contiguous()


def _search_blocks(
    weight: torch.Tensor, grid: Grid, dtype: torch.dtype, column: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero [N, K/G] of a weight in blocks of G rows and columns; the last rows may be fewer."""
    size = grid.group(weight.shape[1])
    scales, zeros = [], []
    for rows in weight.split(size):
        n = len(rows)
        w = rows.view(n, -1, size).transpose(0, 1).reshape(-1, n * size)  # (K/G, n G)
        columns = None if column is None else column[:, None].expand(-1, n, -1).reshape(-1, n * size)
        scale, zero = _search(w, grid, dtype, columns)
        scales.append(scale.expand(n, -1))
        zeros.append(zero.expand(n, -1))
    return torch.cat(scales), torch.cat(zeros)


def _shrinks(grid: Grid) -> list[float]:
    """The factors that a group's range is tried with, the plain range first."""
    if grid.scale == "e8m0":
        return list(EXPONENTS)
    shrinks = [1 - step * STRIDE for step in range(STEPS.get(grid.bits, STEPS_WIDE))]
    return shrinks + list(WIDER) if grid.number.kind == "float" else shrinks


def _others(
    lo: torch.Tensor,
    hi: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    plain: torch.Tensor,
    global_scale: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scale and zero of every group for every range that is tried after the plain one, whose scale is `plain`."""
    if not grid.two_level:
        for shrink in _shrinks(grid)[1:]:
            yield scale_and_zero(lo * shrink, hi * shrink, grid, dtype)
        return
    assert global_scale is not None
    short = to_stored(grid, plain, dtype, global_scale).view(torch.uint8).int()
    zero = torch.full_like(plain, grid.midpoint)
    for step in FP8_STEPS:
        near = (short + step).clamp_(1, _LAST_FP8).to(torch.uint8).view(torch.float8_e4m3fn)
        yield near.to(plain.dtype) / global_scale.to(plain.dtype), zero


def _search(
    w: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    column: torch.Tensor | None,
    global_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero (groups) for w (groups, G); column (K/G, G): the weights of a row of groups, see `_in_steps`.

    A shrunken range is tried only for groups where it can win: their largest weight alone, cut to the end of the range,
    must not cost more than the best range so far does. The result is that of trying all.
    """
    lo, hi = w.amin(1), w.amax(1)
    if column is not None:
        column = column.repeat(len(w) // len(column), 1)
    best_scale, best_zero = scale_and_zero(lo, hi, grid, dtype, global_scale)
    ends = nearest(grid.number)
    least = _in_steps(w, best_scale, best_zero, grid, column) * _step(best_scale, column)
    for scale, zero in _others(lo, hi, grid, dtype, best_scale, global_scale):
        active = None
        if column is None:
            limits = bounds(zero, grid.number)
            cut = torch.maximum(
                hi - ends(hi / scale, *limits) * scale, ends(lo / scale, *limits) * scale - lo
            )
            cost = cut.clamp_(min=0).pow_(_POWER) * _SURE
            active = (cost < least.clamp(min=_SMALL)).nonzero().squeeze(1)
            if not len(active):
                continue
            if len(active) > _WORTH_GATHERING * len(w):
                active = None
        step = _step(scale, column)
        if active is None:
            error = _in_steps(w, scale, zero, grid, column) * step
        else:
            error = torch.full_like(least, torch.inf)
            error[active] = _in_steps(w[active], scale[active], zero[active], grid, None) * step[active]
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _is_native(weight: torch.Tensor, grid: Grid, group: int) -> bool:
    """Whether `_search_natively` takes this weight.

    Rows of whole cache lines: then the errors of rows that were copied out of a matrix have the bits that they have in
    it, whatever the alignment a library's sums depend on.
    """
    plain = weight.is_cpu and weight.dtype == torch.float32 and weight.numel() > 0
    return plain and grid.number.kind == "int" and group % 16 == 0 and library.available()


def _search_natively(
    w: torch.Tensor, grid: Grid, dtype: torch.dtype, column: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_search`, bit for bit: native code finds the ranges that may be the best, those are compared as there."""
    lo, hi = w.amin(1), w.amax(1)
    shrinks = torch.tensor(_shrinks(grid), dtype=w.dtype)[:, None]
    scale, zero = scale_and_zero(lo * shrinks, hi * shrinks, grid, dtype)  # (candidates, groups)
    hopeful = _hopeful(w, scale, zero, grid, column)
    hopeful[1:] &= (lo != 0) | (hi != 0)  # the first range of an empty group is as good as the others
    places = torch.arange(len(shrinks), dtype=w.dtype)
    count, place = torch.stack([torch.ones_like(places), places]) @ hopeful.to(
        w.dtype
    )  # exact: small integers
    best = place.long()  # where only one range is hopeful
    several = (count > 1).nonzero().squeeze(1)
    if len(several):
        best[several] = _decide(w, scale, zero, hopeful, several, grid, column)
    return scale.gather(0, best[None])[0], zero.gather(0, best[None])[0]


def _decide(
    w: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    hopeful: torch.Tensor,
    several: torch.Tensor,
    grid: Grid,
    column: torch.Tensor | None,
) -> torch.Tensor:
    """Which of their hopeful ranges the groups `several` take: the one that `_search` would, by the same arithmetic."""
    if len(w) % _ALIGNED:  # `pow` of `_search` rounds the last few groups otherwise than the rest
        step = torch.stack([_step(s, column) for s in scale])[:, several]
    else:
        full = torch.cat([several, several.new_zeros(-len(several) % _ALIGNED)])
        step = torch.stack([_step(s, column) for s in scale[:, full]])[:, : len(several)]
    error = torch.full_like(step, torch.inf)
    for pairs in torch.split(hopeful[:, several].nonzero(), max(1, _CHUNK // w.shape[1])):
        c, place = pairs.unbind(1)
        g = several[place]
        columns = None if column is None else column[g % len(column)]
        error[c, place] = _in_steps(w[g], scale[c, g], zero[c, g], grid, columns) * step[c, place]
    # As in `_search`: the first of equals wins, no range is better than one with a NaN, and a NaN is never better.
    error[0] = torch.where(error[0].isnan(), -torch.inf, error[0])
    return error.nan_to_num_(torch.inf, torch.inf, -torch.inf).argmin(0)


def _hopeful(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid, column: torch.Tensor | None
) -> torch.Tensor:
    """Which of the ranges (candidates, groups) may have a group's least error as `_search` computes it.

    Native errors differ from those in two ways. Sums of G terms are rounded otherwise: a relative difference of at most
    some 2 G 2^-24. And w * (1/s) differs from w/s by up to 3 roundings of it, so each |off| by as much: by Minkowski's
    inequality the root of the sum of |off|^p, in weights `column`, then differs by at most that times the root of the
    sum of the weights. Where fp32's range ends neither holds, and all ranges are hopeful.
    """
    group = w.shape[1]
    error = range_errors(w, scale, zero, grid.qmax, column)
    power = _POWER if column is None else 2
    least, widest = error.amin(0), scale.amax(0)
    rounding = (
        2.0**-22 * (grid.qmax + 1) / _shrinks(grid)[-1]
    )  # of w/s, which ends where the smallest range ends
    if column is None:
        weights = torch.full_like(widest, group)
    else:
        weights = column.sum(1).repeat(len(w) // len(column))
    slack = 2 * rounding * weights.pow(1 / power) * widest
    limit = (least.pow(1 / power) * (1 + 1e-4 + 4 * group * 2.0**-24) + slack).pow(power)
    normal = (least > _SMALL) & (least > _SMALL * widest.pow(power)) & (least < 1 / _SMALL)
    return (error <= limit) | ~normal


def _in_steps(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid, column: torch.Tensor | None
) -> torch.Tensor:
    """Error of every group of w (groups, G): |.|^2.5, or squared and weighted by `column` (groups, G) if given.

    In units of the step, off = level - w/s: half the passes of dequantizing; `_step` is the unit. GPTQ's power 2.4 is
    as good and needs `pow`, 2 clips too deep (docs/LOG.md).
    """
    steps = w / scale[:, None]
    off = nearest(grid.number)(steps, *bounds(zero[:, None], grid.number), torch.empty_like(steps)).sub_(
        steps
    )
    if column is not None:
        squares: torch.Tensor = torch.linalg.vecdot(off, off * column)
        return squares
    powers: torch.Tensor = torch.linalg.vecdot(torch.mul(off, off, out=steps), off.abs_().sqrt_())
    return powers


def _step(scale: torch.Tensor, column: torch.Tensor | None) -> torch.Tensor:
    """The unit of `_in_steps` in units of the weights.

    Of all groups of a chunk at once: torch's `pow` rounds the last few numbers of a tensor otherwise than the rest.
    """
    return scale.pow(_POWER) if column is None else scale.square()
