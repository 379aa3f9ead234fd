"""The range search: what it skips could not have won."""

import pytest
import torch
from quantkit_kernels.cpu import library

from quantkit.numerics import range_search
from quantkit.numerics.grid import round_to_grid, scale_and_zero
from quantkit.numerics.range_search import search_grid
from quantkit.numerics.refit import refit_scale
from quantkit.numerics.statistics import neutral
from quantkit.scheme import NUMBERS, Grid, integer

needs_native = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

GRIDS = [integer(2, 32), integer(3, 32, False), integer(4, 64), integer(4, None, False), integer(8, 32)] + [
    Grid(NUMBERS[name], "group", 32) for name in ("fp8_e4m3", "fp4_e2m1", "nf4")
]


def tried(monkeypatch) -> list[int]:
    """How many groups every call of the error in torch is about, from now on."""
    groups: list[int] = []
    real = range_search._in_steps
    monkeypatch.setattr(
        range_search, "_in_steps", lambda w, *rest: (groups.append(len(w)), real(w, *rest))[1]
    )
    return groups


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("method", ["mse", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_skipping_what_cannot_win_changes_nothing(grid, method, dtype, monkeypatch):
    """With `_SURE` = 0 nothing is skipped. Normal rows, rows with an outlier, constant rows, rows of zeros."""
    monkeypatch.setattr(range_search, "_is_native", lambda *_: False)
    g = torch.Generator().manual_seed(0)
    w = torch.randn(64, 256, generator=g) * torch.logspace(-6, 0, 64)[:, None]
    w[3], w[4], w[5:20, 7] = 0, 0.5, 3.0
    importance = torch.rand(256, generator=g)
    found = search_grid(w, grid, dtype, method, importance)
    monkeypatch.setattr(range_search, "_SURE", 0.0)
    for each, wanted in zip(found, search_grid(w, grid, dtype, method, importance), strict=True):
        assert torch.equal(each, wanted)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_chunks_of_rows_change_nothing(grid, monkeypatch):
    w = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    found = search_grid(w, grid, torch.bfloat16, "mse")
    monkeypatch.setattr(range_search, "_CHUNK", 7 * 256)
    for each, wanted in zip(found, search_grid(w, grid, torch.bfloat16, "mse"), strict=True):
        assert torch.equal(each, wanted)


def test_most_of_8_bits_is_skipped(monkeypatch):
    """Cutting the largest of a channel's weights costs more than 8-bit rounding does, nearly from the first step on."""
    monkeypatch.setattr(range_search, "_is_native", lambda *_: False)
    groups = tried(monkeypatch)
    search_grid(
        torch.randn(64, 512, generator=torch.Generator().manual_seed(0)),
        integer(8, None),
        torch.bfloat16,
        "mse",
    )
    assert sum(groups) < 64 * range_search.STEPS_WIDE / 2


def all_tried(w, grid, dtype, importance):
    """The definition: every range's error for every group, the first of the least ones. importance: None for `mse`."""
    parts = []
    for rows in torch.split(w, max(1, range_search._CHUNK // w.shape[1])):
        groups = rows.reshape(-1, grid.group(w.shape[1]))
        column = None if importance is None else importance.repeat(len(rows)).view_as(groups)
        lo, hi = groups.amin(1), groups.amax(1)
        best = None
        for shrink in range_search._shrinks(grid):
            scale, zero = scale_and_zero(lo * shrink, hi * shrink, grid, dtype)
            error = range_search._in_steps(groups, scale, zero, grid, column)
            error = error * range_search._step(scale, column)
            if best is None:
                best = error, scale, zero
            better = error < best[0]
            best = tuple(
                torch.where(better, new, old) for new, old in zip((error, scale, zero), best, strict=True)
            )
        parts.append(best[1:])
    return [torch.cat([part[i] for part in parts]).view(len(w), -1) for i in (0, 1)]


def plain(rows, k, g):
    return torch.randn(rows, k, generator=g) * 0.02


def far_scales(rows, k, g):
    """From where the errors underflow to where they overflow, and a row of zeros."""
    w = torch.randn(rows, k, generator=g) * torch.logspace(-25, 18, rows)[:, None]
    w[rows // 2] = 0
    return w


def outliers(rows, k, g):
    w = plain(rows, k, g)
    w[:, 5] = 3.0
    return w


def on_a_grid(rows, k, g):
    return (torch.randn(rows, k, generator=g) * 4).round() / 8


def not_finite(rows, k, g):
    w = plain(rows, k, g)
    w[-1, 3], w[0, k // 2] = torch.nan, torch.inf
    return w


WEIGHTS = (plain, far_scales, outliers, on_a_grid, not_finite)


@needs_native
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("group", [16, 128, None])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_native_first_look_changes_no_bit(bits, group, weights, monkeypatch):
    shapes = {"plain": (1, 256), "far_scales": (44, 384)}
    rows, k = shapes.get(weights.__name__, (37, 256))
    g = torch.Generator().manual_seed(bits)
    w, importance = weights(rows, k, g), torch.rand(k, generator=g)
    importance[:16] = 0
    for symmetric in (True, False):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for method, column in (("mse", None), ("weighted", importance)):
                grid = integer(bits, group, symmetric)
                found = search_grid(w, grid, dtype, method, column)
                with monkeypatch.context() as patch:
                    patch.setattr(range_search, "_is_native", lambda *_: False)
                    torch_only = search_grid(w, grid, dtype, method, column)
                wanted = all_tried(w, grid, dtype, None if column is None else neutral(column))
                for each, other, right in zip(found, torch_only, wanted, strict=True):
                    assert torch.equal(each.nan_to_num(-1.0), right.nan_to_num(-1.0))
                    assert torch.equal(other.nan_to_num(-1.0), right.nan_to_num(-1.0))


@needs_native
def test_what_is_not_fp32_in_whole_cache_lines_goes_to_torch(monkeypatch):
    monkeypatch.setattr(range_search, "_search_natively", None)
    w = plain(8, 256, torch.Generator().manual_seed(0))
    search_grid(w.double(), integer(4, 32), torch.float16, "mse")
    search_grid(w[:, :200].contiguous(), integer(4, 8), torch.float16, "mse")
    search_grid(w, Grid(NUMBERS["nf4"], "group", 32), torch.float16, "mse")


@needs_native
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_few_ranges_are_left_to_torch(bits, monkeypatch):
    groups = tried(monkeypatch)
    w = plain(64, 1024, torch.Generator().manual_seed(0))
    search_grid(w, integer(bits, 128), torch.float16, "mse")
    assert sum(groups) < 64 * 8


@needs_native
def test_a_weight_of_zeros_costs_torch_nothing(monkeypatch):
    groups = tried(monkeypatch)
    scale, _ = search_grid(torch.zeros(16, 256), integer(4, 128), torch.float16, "mse")
    assert torch.equal(scale, torch.ones(16, 2))
    assert not groups


@pytest.mark.parametrize("dead", [slice(0, 1), slice(0, 32), slice(0, 256)], ids=["one", "a group", "all"])
def test_columns_without_importance_are_not_cut_off_for_free(dead):
    """They count as average ones. With weight 0 a lone one of large weights would lose 23 % of its squares, not 3 %."""
    g = torch.Generator().manual_seed(0)
    w, importance = torch.randn(64, 256, generator=g), torch.rand(256, generator=g) + 0.1
    w[:, dead] *= 3
    importance[dead] = 0
    grid = integer(3, 32)
    scale, zero = search_grid(w, grid, torch.float16, "weighted", importance)
    scale = refit_scale(w, scale, zero, grid, torch.float16, 3, importance)
    assert (torch.isfinite(scale) & (scale > 0)).all()
    off = round_to_grid(w.view(64, -1, 32), scale[:, :, None], zero[:, :, None], grid).view(64, 256) - w
    assert off[:, dead].square().sum() < 0.05 * w[:, dead].square().sum()


def test_no_importance_at_all_is_equal_importance():
    w = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    found = [
        search_grid(w, integer(3, 32), torch.float16, "weighted", v)
        for v in (torch.zeros(256), torch.ones(256))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
