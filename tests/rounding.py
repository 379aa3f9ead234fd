"""What every grid promises of rounding to nearest."""

import torch

from quantkit.algorithms.rtn import rtn
from quantkit.numerics.grid import over_rows
from quantkit.scheme import Grid


def assert_searches_pay(w: torch.Tensor, grid: Grid, most: float) -> None:
    """No range search is worse than min-max where a scale holds, by its own metric; `mse` leaves less than `most`."""
    n, k = w.shape
    column = torch.rand(k, generator=torch.Generator().manual_seed(1)) ** 3

    def error(q, weights, norm):
        each = ((q.dequantize() - w).abs() ** norm * weights).view(n, -1, grid.group(k)).sum(2)
        return each.sum() if grid.two_level and q is not refitted else over_rows(each, grid)

    refitted = rtn(w, grid, torch.float32, "minmax", 3)
    plain = rtn(w, grid, torch.float32)
    searched = rtn(w, grid, torch.float32, "mse")
    weighted = rtn(w, grid, torch.float32, "weighted", 0, column)
    tolerance = 1 + 1e-5
    assert (error(searched, 1, 2.5) <= error(plain, 1, 2.5) * tolerance).all()
    assert (error(weighted, column, 2) <= error(plain, column, 2) * tolerance).all()
    assert (error(refitted, 1, 2) <= error(plain, 1, 2) * tolerance).all()
    assert error(searched, 1, 2.5).sum() < most * error(plain, 1, 2.5).sum()
