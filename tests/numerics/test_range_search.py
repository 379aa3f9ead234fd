"""The range search: what it skips could not have won."""

import pytest
import torch

from quantkit.numerics import range_search
from quantkit.numerics.range_search import search_grid
from quantkit.scheme import NUMBERS, Grid, integer

GRIDS = [integer(2, 32), integer(3, 32, False), integer(4, 64), integer(4, None, False), integer(8, 32)] + [
    Grid(NUMBERS[name], "group", 32) for name in ("fp8_e4m3", "fp4_e2m1", "nf4")
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("method", ["mse", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_skipping_what_cannot_win_changes_nothing(grid, method, dtype, monkeypatch):
    """With `_SURE` = 0 nothing is skipped. Normal rows, rows with an outlier, constant rows, rows of zeros."""
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
    groups = []
    real = range_search._error
    monkeypatch.setattr(range_search, "_error", lambda w, *rest: (groups.append(len(w)), real(w, *rest))[1])
    search_grid(
        torch.randn(64, 512, generator=torch.Generator().manual_seed(0)),
        integer(8, None),
        torch.bfloat16,
        "mse",
    )
    assert sum(groups) < 64 * range_search.STEPS_WIDE / 2
