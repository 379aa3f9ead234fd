"""Scales and zero points: exact zeros, stored precision, and the small end of fp16."""

import pytest
import torch

from quantkit.algorithms.rtn import rtn
from quantkit.numerics.grid import as_stored, round_to_grid, scale_and_zero, smallest_scale
from quantkit.scheme import NUMBERS, Grid, integer

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
GRIDS = [integer(2, 32), integer(4, 32, False), integer(8, None)] + [
    Grid(NUMBERS[name], "group", 32) for name in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4")
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zero_is_on_every_grid(grid, dtype):
    g = torch.Generator().manual_seed(0)
    lo, hi = torch.randn(2, 50, generator=g)
    lo, hi = torch.minimum(lo, hi), torch.maximum(lo, hi)
    scale, zero = scale_and_zero(lo, hi, grid, dtype)
    assert torch.equal(scale, scale.to(dtype).float())
    assert (scale > 0).all()
    assert (round_to_grid(torch.zeros(50), scale, zero, grid) == 0).all()


def test_scales_that_are_normal_are_rounded_to_nearest():
    scale = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 7e-5
    for dtype in DTYPES:
        assert torch.equal(as_stored(scale, dtype), scale.to(dtype).float())


def test_fp16_scales_go_down_to_its_subnormals_and_never_below_what_was_asked():
    scale = torch.logspace(-4.3, -9, 500)
    stored = as_stored(scale, torch.float16)
    assert torch.equal(stored, stored.half().float())
    assert (stored >= scale).all()
    assert float(stored.min()) == smallest_scale(torch.float16) == 2.0**-24
    assert (stored <= torch.maximum(scale + 2.0**-24, torch.tensor(2.0**-24))).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("std", [3e-4, 1e-4, 1e-5, 1e-6, 1e-7])
def test_rows_of_small_fp16_weights_lose_no_bits(bits, symmetric, method, std):
    """Per row: about the error that the same weights have at a size where nothing is subnormal."""
    w = (torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) * std).half().float()
    small = rtn(w, integer(bits, 32, symmetric), torch.float16, method)
    large = rtn(w * 2.0**20, integer(bits, 32, symmetric), torch.float32, method)
    error, norm = small.row_errors(w)
    usual, _ = large.row_errors(w * 2.0**20)
    assert (error / norm <= 4 * usual / (norm * 2.0**40) + 1e-4).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_the_smallest_size_are_exact(dtype):
    w = torch.tensor([[1.0, -1.0, 0.0, 2.0] * 8]) * smallest_scale(dtype)
    assert torch.equal(rtn(w, integer(4, 32), dtype).dequantize(), w)
