"""GPTQ (Frantar et al. 2022) with what measures better on top of it.

Minimise tr((W - W_hat) H (W - W_hat)^T) per linear. Columns are quantized in a fixed order; the error of each is
spread over the columns still open with the optimal update, which needs only U, the upper Cholesky factor of H^-1.
Around that core, each an option:
- re-target (`retarget`): aim at W* = W + a W D (H + lI)^-1 so that the layer, fed by the quantized prefix, gives what
  the original gave on the original's inputs (D = 2/N sum (x_full - x) x^T);
- sweeps (`refine`): cyclic coordinate descent on the same objective afterwards (QuantEase); monotone.

Weights of one shape can be solved as one batch. Inside a chunk of rows matrices are transposed, [E, K, n], as in
columns.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.algorithms.columns import ColumnGrid, quadratic, solve, sweep
from quantkit.algorithms.config import GptqConfig
from quantkit.algorithms.registry import Outcome, register
from quantkit.algorithms.rtn import rtn
from quantkit.numerics.grid import to_stored
from quantkit.numerics.number import encode
from quantkit.numerics.range_search import search_global, search_grid
from quantkit.numerics.statistics import Statistics, dead_note
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Grid

CHUNK_ELEMENTS = 1 << 21  # rows x K solved at a time
DAMPING_LADDER = (1.0, 3.0, 10.0, 30.0, 100.0)  # times the configured damping, until Cholesky succeeds
SAFE_DAMPING = 1e-4  # less is used only where H^-1 has no larger entry than this damping allows


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H + damping * mean(diag H) * I, as a new matrix."""
    h = hessian.clone()
    diagonal = h.diagonal()
    diagonal += damping * diagonal.mean()
    return h


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """V = L^-1 (lower) with J H J = L L^T, J the reversal of order; None if H is not positive definite.

    The factor GPTQ wants, upper U with H^-1 = U^T U, is J V J: one Cholesky and one triangular inverse in one buffer,
    instead of forming H^-1 and factoring that. `solve` reads U block by block through the reversal.
    """
    factor = hessian.flip(0, 1).mT  # column-major, as LAPACK works: factored in place, without a copy
    info = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if int(info):
        return None
    _invert_lower_(factor)
    return factor if bool(torch.isfinite(factor.diagonal()).all()) else None


def _invert_lower_(lower: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place, by halves: [[A, 0], [B, C]]^-1 has -C^-1 B A^-1 below."""
    k = len(lower)
    if k <= 256:
        eye = torch.eye(k, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = k // 2
    first, below, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower_(first)
    _invert_lower_(last)
    below.copy_((last @ below @ first).neg_())


def column_order(diagonal: torch.Tensor, group: int, order: str) -> torch.Tensor:
    """The order in which columns are quantized: by falling diag(H), as stored, or falling inside ordered groups."""
    if order == "none":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    if order == "activation":
        return torch.argsort(diagonal, descending=True, stable=True)
    by_group = diagonal.view(-1, group)
    groups = torch.argsort(by_group.amax(1), descending=True, stable=True)
    inside = torch.argsort(by_group, dim=1, descending=True, stable=True)[groups]  # (K/G, G)
    return (inside + groups[:, None] * group).flatten()


def retarget_shift(pull: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """W D H^-1 from pull = W D [N, K] and V of `inverse_factor`, in one column order: H^-1 = J V^T V J."""
    return (pull.flip(1) @ factor.T @ factor).flip(1)


def permuted(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """matrix[order][:, order] without a second temporary of its size."""
    out = torch.empty_like(matrix)
    for rows, into in zip(order.split(256), out.split(256), strict=True):
        into.copy_(matrix[rows][:, order])
    return out


def _positive_definite(
    hessian: torch.Tensor, damping: float, fallbacks: list[str]
) -> tuple[torch.Tensor, float] | None:
    """Damp `hessian` in place, step by step, until it has an inverse that does not blow up rounding errors.

    Returns (factor, damping used), or None. A singular H can pass Cholesky by rounding errors; a damping d bounds the
    diagonal of H^-1, the squared column norms of its factor, by 1 / (d mean diag H).
    """
    mean = hessian.diagonal().mean()
    added = 0.0
    for times in DAMPING_LADDER:
        wanted = damping if times == 1 else max(damping, SAFE_DAMPING) * times
        hessian.diagonal().add_((wanted - added) * mean)
        added = wanted
        factor = inverse_factor(hessian)
        if factor is None:
            continue
        largest = float(torch.linalg.vector_norm(factor, dim=0).max()) ** 2
        if added >= SAFE_DAMPING or largest * float(mean) * SAFE_DAMPING <= 1:
            if times > 1:
                fallbacks.append(
                    f"damping raised to {added:g}: with less, the Hessian is not positive definite or nearly singular"
                )
            return factor, added
    return None


def quantize_all(
    weights: Sequence[torch.Tensor],
    statistics: Sequence[Statistics],
    grid: Grid,
    dtype: torch.dtype,
    config: GptqConfig,
) -> list[Outcome]:
    """`quantize` of several weights of one shape, each with its own statistics, as one batch: for GPUs.

    Their column loops and sweeps are one; the results may differ in the last bits from those of one at a time.
    """
    all_ = [_prepared(*each, grid, config) for each in zip(weights, statistics, strict=True)]
    ready = [each for each in all_ if each.factor is not None]
    solved = iter(_Problem(ready, grid, dtype, config).outcomes() if ready else [])
    return [next(solved) if each.factor is not None else _nearest(each, grid, dtype, config) for each in all_]


@register("gptq", lambda config: config.needs, quantize_all)
def quantize(
    weight: torch.Tensor, statistics: Statistics, grid: Grid, dtype: torch.dtype, config: GptqConfig
) -> Outcome:
    """Quantize `weight` [N, K] (fp32; fp64 in tests) with statistics.hessian [K, K].

    The matrices of `statistics` are consumed (set to None), so that only what is still needed stays in memory.
    """
    return quantize_all([weight], [statistics], grid, dtype, config)[0]


@dataclass
class _Prepared:
    """A weight [N, K] and what its columns are quantized with.

    order: of the columns. hessian (damped), factor, pull (W D, if the weight is to be re-targeted): in that order.
    factor: None if the Hessian has none. importance: see `Statistics.mean_square`.
    """

    weight: torch.Tensor
    order: torch.Tensor
    hessian: torch.Tensor
    factor: torch.Tensor | None
    pull: torch.Tensor | None
    importance: torch.Tensor | None
    details: dict[str, float | int | str]
    fallbacks: list[str]


def _prepared(weight: torch.Tensor, statistics: Statistics, grid: Grid, config: GptqConfig) -> _Prepared:
    fallbacks: list[str] = []
    assert statistics.hessian is not None
    hessian, statistics.hessian = statistics.hessian.to(weight.dtype), None
    drift, statistics.drift = statistics.drift, None
    silent = hessian.diagonal() == 0
    details: dict[str, float | int | str] = {
        "dead_columns": _report_silent(silent, statistics.fired, fallbacks)
    }
    order = column_order(hessian.diagonal(), grid.group(weight.shape[1]), config.order)
    pull = None
    if config.retarget:
        assert drift is not None
        pull = (weight @ drift.to(weight.dtype)).masked_fill_(silent, 0)[:, order]
        del drift
    h = permuted(hessian, order)
    del hessian
    mean = h.diagonal().mean()
    h.diagonal()[silent[order]] = torch.where(mean > 0, mean, 1.0)  # alone in its row: rounded to nearest
    factor = None
    if found := _positive_definite(h, config.damping, fallbacks):
        factor, details["damping"] = found
    return _Prepared(weight, order, h, factor, pull, statistics.mean_square, details, fallbacks)


def _nearest(one: _Prepared, grid: Grid, dtype: torch.dtype, config: GptqConfig) -> Outcome:
    note = "rounded to nearest: no damping made the Hessian positive definite"
    quantized = rtn(one.weight, grid, dtype, config.range, 0, one.importance)
    return Outcome(quantized, details=one.details, fallbacks=[*one.fallbacks, note])


def _report_silent(silent: torch.Tensor, fired: torch.Tensor | None, fallbacks: list[str]) -> int:
    """The number of dead columns, with what to say about columns [K] that the Hessian says nothing about.

    silent: their diagonal is 0. fired: their input was not, but its square underflows; None if that is not known.
    """
    k = silent.numel()
    small = 0 if fired is None else int((silent & fired).sum())
    dead = int(silent.sum()) - small
    if note := dead_note(dead, k, "rounded to nearest"):
        fallbacks.append(note)
    if small:
        fallbacks.append(
            f"{small} of {k} columns are rounded to nearest: the squares of their inputs underflow"
        )
    return dead


@dataclass
class _Rows:
    """Some rows of E weights solved: codes [E, n, K], scale and zero [E, n, K/G] as stored.

    Per row [E, n]: E H E^T, W H W^T and the codes that sweeps changed.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor
    norm: torch.Tensor
    changed: torch.Tensor


class _Problem:
    """E weights of one shape that are solved together, each with a Hessian of its own: matrices [E, K, K]."""

    def __init__(self, members: list[_Prepared], grid: Grid, dtype: torch.dtype, config: GptqConfig) -> None:
        self.members, self.grid, self.dtype, self.config = members, grid, dtype, config
        self.hessian = _stacked([one.hessian for one in members])
        self.factor = _stacked([one.factor for one in members if one.factor is not None])
        for e, one in enumerate(members):  # views of the stacked ones: the single ones are freed
            one.hessian, one.factor = self.hessian[e], self.factor[e]
        k = len(members[0].order)
        self.groups = torch.stack([one.order for one in members]) // grid.group(k)  # [E, K]
        self.global_scales: list[torch.Tensor | None] = [None] * len(members)

    def outcomes(self) -> list[Outcome]:
        """All rows solved, a chunk at a time: that bounds the memory and does not change the result."""
        n, k = self.members[0].weight.shape
        rows = max(1, CHUNK_ELEMENTS // (k * len(self.members)))
        chunks = [slice(first, first + rows) for first in range(0, n, rows)]
        if not self.grid.rows_share:
            targets = map(self._target, chunks)
            parts = [self._solve(target, *self._search(self._by_rows(target))) for target in targets]
        else:  # the scales of all rows are found before, for what the rows aim at
            aims = [self._target(chunk) for chunk in chunks]
            scale, zero = self._search(self._by_rows(torch.cat(aims, 2)))
            found = zip(aims, scale.split(rows, 1), zero.split(rows, 1), strict=True)
            parts = [self._solve(*part) for part in found]
        return [self._outcome(e, parts) for e in range(len(self.members))]

    def _outcome(self, e: int, parts: list[_Rows]) -> Outcome:
        changed = torch.cat([p.changed[e] for p in parts])
        weight = QuantizedWeight(
            codes=torch.cat([p.codes[e] for p in parts]),
            scale=torch.cat([p.scale[e] for p in parts]),
            zero=None if self.grid.symmetric else torch.cat([p.zero[e] for p in parts]),
            grid=self.grid,
            global_scale=self.global_scales[e],
        )
        return Outcome(
            weight,
            torch.cat([p.error[e] for p in parts]),
            torch.cat([p.norm[e] for p in parts]),
            {"codes_changed_by_sweeps": changed} if self.config.refine else {},
            self.members[e].details,
            self.members[e].fallbacks,
        )

    def _target(self, rows: slice) -> torch.Tensor:
        """What some rows aim at, [E, K, n] in quantization order."""
        found = []
        for one, factor in zip(self.members, self.factor, strict=True):
            target = one.weight[rows].T[one.order].contiguous()
            if one.pull is not None:
                target.add_(retarget_shift(one.pull[rows], factor).T, alpha=self.config.retarget)
            found.append(target)
        return _stacked(found)

    def _by_rows(self, columns: torch.Tensor) -> torch.Tensor:
        """[E, K, n] in quantization order as rows [E, n, K] in the order of the weight."""
        rows = columns.new_empty(columns.mT.shape)
        for one, into, given in zip(self.members, rows, columns, strict=True):
            into[:, one.order] = given.T
        return rows

    def _search(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The grids of rows [E, n, K]: scale and zero [E, n, K/G]."""
        found = []
        for e, (w, one) in enumerate(zip(weights, self.members, strict=True)):
            method, importance = self.config.range, one.importance
            if self.grid.rows_share:
                self.global_scales[e] = search_global(w, self.grid, method, importance)
            found.append(search_grid(w, self.grid, self.dtype, method, importance, self.global_scales[e]))
        return _stacked([scale for scale, _ in found]), _stacked([zero for _, zero in found])

    def _solve(self, target: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> _Rows:
        """Quantize rows, of which `target` is what they aim at, to the grids that `_search` has found."""
        config, grid = self.config, self.grid
        shared = [each for each in self.global_scales if each is not None]
        grids = ColumnGrid(
            scale.mT.contiguous(), zero.mT.contiguous(), self.groups, torch.stack(shared) if shared else None
        )
        dynamic = self.dtype if config.groups == "dynamic" else None
        levels, errors = solve(target.clone(), self.factor, grids, grid, config.block, dynamic)
        error = errors.square_().sum(1)
        changed = torch.zeros_like(error)
        del errors
        if config.refine:
            changed, gained = sweep(target, self.hessian, levels, grids, grid, config.refine)
            error = (error + gained).clamp_(min=0)
        shift = None if grid.symmetric else grids.of_columns(grids.zero)
        stored = [
            to_stored(grid, each.T.contiguous(), self.dtype, global_scale)
            for each, global_scale in zip(grids.scale, self.global_scales, strict=True)
        ]
        return _Rows(
            self._by_rows(encode(levels, grid.number, shift)),
            _stacked(stored),
            grids.zero.mT.contiguous().to(torch.uint8),
            error,
            quadratic(self.hessian, target),
            changed,
        )


def _stacked(matrices: list[torch.Tensor]) -> torch.Tensor:
    """[E, ...] of E tensors; of a single one a view."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)
