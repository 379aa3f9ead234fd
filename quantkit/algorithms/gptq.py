"""GPTQ (Frantar et al. 2022) with what measures better on top of it.

Minimise tr((W - W_hat) H (W - W_hat)^T) per linear. Columns are quantized in a fixed order; the error of each is
spread over the columns still open with the optimal update, which needs only U, the upper Cholesky factor of H^-1.
Around that core, each an option:
- re-target (`retarget`): aim at W* = W + a W D (H + lI)^-1 so that the layer, fed by the quantized prefix, gives what
  the original gave on the original's inputs (D = 2/N sum (x_full - x) x^T);
- sweeps (`refine`): cyclic coordinate descent on the same objective afterwards (QuantEase); monotone.

Inside a chunk of rows matrices are transposed, [K, n], as in columns.py.
"""

from __future__ import annotations

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


@register("gptq", lambda config: config.needs)
def quantize(
    weight: torch.Tensor, statistics: Statistics, grid: Grid, dtype: torch.dtype, config: GptqConfig
) -> Outcome:
    """Quantize `weight` [N, K] (fp32; fp64 in tests) with statistics.hessian [K, K].

    The matrices of `statistics` are consumed (set to None), so that only what is still needed stays in memory.
    """
    fallbacks: list[str] = []
    assert statistics.hessian is not None
    hessian, statistics.hessian = statistics.hessian.to(weight.dtype), None
    drift, statistics.drift = statistics.drift, None
    silent = hessian.diagonal() == 0
    details: dict[str, float | int | str] = {
        "dead_columns": _report_silent(silent, statistics.fired, fallbacks)
    }
    k = weight.shape[1]
    order = column_order(hessian.diagonal(), grid.group(k), config.order)
    pull = None
    if config.retarget:
        assert drift is not None
        pull = (weight @ drift.to(weight.dtype)).masked_fill_(silent, 0)[:, order]
        del drift
    h = permuted(hessian, order)
    del hessian
    mean = h.diagonal().mean()
    h.diagonal()[silent[order]] = torch.where(mean > 0, mean, 1.0)  # alone in its row: rounded to nearest
    found = _positive_definite(h, config.damping, fallbacks)
    if found is None:
        fallbacks.append("rounded to nearest: no damping made the Hessian positive definite")
        quantized = rtn(weight, grid, dtype, config.range, 0, statistics.mean_square)
        return Outcome(quantized, details=details, fallbacks=fallbacks)
    factor, details["damping"] = found

    problem = _Problem(h, factor, order, grid, dtype, config, statistics.mean_square)
    del h, factor
    parts = problem.solve_all(weight, pull, max(1, CHUNK_ELEMENTS // k))
    counts = {"codes_changed_by_sweeps": torch.cat([p.changed for p in parts])} if config.refine else {}
    return Outcome(
        QuantizedWeight(
            codes=torch.cat([p.codes for p in parts]),
            scale=torch.cat([p.scale for p in parts]),
            zero=None if grid.symmetric else torch.cat([p.zero for p in parts]),
            grid=grid,
            global_scale=problem.global_scale,
        ),
        torch.cat([p.error for p in parts]),
        torch.cat([p.norm for p in parts]),
        counts,
        details,
        fallbacks,
    )


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
    """Some rows solved: codes, scale and zero as stored; per row E H E^T, W H W^T and the codes that sweeps changed."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    error: torch.Tensor
    norm: torch.Tensor
    changed: torch.Tensor


@dataclass
class _Problem:
    """What all rows of a weight share. hessian (damped) and factor are in quantization order.

    global_scale: of a two-level grid, known when the rows are solved.
    """

    hessian: torch.Tensor
    factor: torch.Tensor
    order: torch.Tensor
    grid: Grid
    dtype: torch.dtype
    config: GptqConfig
    importance: torch.Tensor | None
    global_scale: torch.Tensor | None = None

    def solve_all(self, weight: torch.Tensor, pull: torch.Tensor | None, rows: int) -> list[_Rows]:
        """Quantize a weight [N, K], `rows` at a time: a chunk bounds the memory, not the result.

        pull: W D [N, K] in quantization order, if the weight is to be re-targeted. Only scales that rows share are
        found for all of the (re-targeted) weight before.
        """
        pulls = [None] * -(-len(weight) // rows) if pull is None else list(pull.split(rows))
        if not self.grid.rows_share:
            return [self.solve(w, p) for w, p in zip(weight.split(rows), pulls, strict=True)]
        if pull is not None:
            targets = [self._target(w, p) for w, p in zip(weight.split(rows), pulls, strict=True)]
            weight = self._in_order_of_columns(torch.cat(targets, 1))
            del targets
        method = self.config.range
        self.global_scale = search_global(weight, self.grid, method, self.importance)
        found = self._search(weight)
        scales, zeros = (each.split(rows) for each in found)
        return [
            self.solve(*part)
            for part in zip(weight.split(rows), [None] * len(scales), scales, zeros, strict=True)
        ]

    def _search(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return search_grid(
            weight, self.grid, self.dtype, self.config.range, self.importance, self.global_scale
        )

    def _target(self, weight: torch.Tensor, pull: torch.Tensor | None) -> torch.Tensor:
        """What the rows [n, K] aim at, [K, n] in quantization order."""
        target = weight.T[self.order].contiguous()  # (K, n)
        if pull is not None:
            target.add_(retarget_shift(pull, self.factor).T, alpha=self.config.retarget)
        return target

    def _in_order_of_columns(self, target: torch.Tensor) -> torch.Tensor:
        """The inverse of `_target` without a pull: [n, K]."""
        weight = target.new_empty(target.shape[1], target.shape[0])
        weight[:, self.order] = target.T
        return weight

    def solve(
        self,
        weight: torch.Tensor,
        pull: torch.Tensor | None,
        scale: torch.Tensor | None = None,
        zero: torch.Tensor | None = None,
    ) -> _Rows:
        """Quantize rows [n, K]. pull: as in `solve_all`. scale, zero [n, K/G]: None: found here."""
        config, grid, h = self.config, self.grid, self.hessian
        target = self._target(weight, pull)
        if pull is not None:
            weight = self._in_order_of_columns(target)
        if scale is None or zero is None:
            scale, zero = self._search(weight)
        groups = (self.order // grid.group(len(h))).tolist()
        grids = ColumnGrid(scale.T.contiguous(), zero.T.contiguous(), groups, self.global_scale)
        dynamic = self.dtype if config.groups == "dynamic" else None
        levels, errors = solve(target.clone(), self.factor, grids, grid, config.block, dynamic)
        error = errors.square_().sum(0)
        changed = torch.zeros_like(error)
        del errors
        if config.refine:
            changed, gained = sweep(target, h, levels, grids, grid, config.refine)
            error = (error + gained).clamp_(min=0)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        shift = None if grid.symmetric else grids.zero[groups]
        codes[:, self.order] = encode(levels, grid.number, shift).T
        return _Rows(
            codes,
            to_stored(grid, grids.scale.T.contiguous(), self.dtype, self.global_scale),
            grids.zero.T.contiguous().to(torch.uint8),
            error,
            quadratic(h, target),
            changed,
        )
