"""The range that a stored scale of inputs covers."""

import pytest
import torch

from quantkit.numerics.input_range import InputRange, choose, clipped, count
from quantkit.numerics.inputs import round_inputs
from quantkit.scheme import NUMBERS, Grid

INT8 = Grid(NUMBERS["int8"], "tensor")
ASYM = Grid(NUMBERS["int8"], "tensor", symmetric=False)
FP8 = Grid(NUMBERS["fp8_e4m3"], "tensor")


def inputs(outlier=0.0, shift=0.0):
    x = torch.randn(200, 100, generator=torch.Generator().manual_seed(0)) + shift
    if outlier:
        x[0, 0] = outlier
    return x


def seen(x):
    return InputRange(x.amin().view(1), x.amax().view(1), count(x))


def test_every_value_is_counted_once_whatever_its_size():
    x = torch.tensor([0.0, -0.0, 1.0, 1.001, -1e30, 3e-40])
    counts = count(x)
    assert int(counts.sum()) == 6
    assert int(counts[0x3F80]) == 2
    assert int(counts[0x8000]) == 1


@pytest.mark.parametrize("grid", [INT8, ASYM, FP8], ids=str)
def test_all_of_the_range_is_what_minmax_covers(grid):
    x = inputs(outlier=9.0)
    scale = choose(seen(x), grid, "minmax", torch.float32)
    steps = {INT8: 127.5 / 9, FP8: 448 / 9, ASYM: 255 / (9 - float(x.amin()))}[grid]
    torch.testing.assert_close(scale.scale, torch.tensor([1 / steps]))
    assert clipped(seen(x), scale, grid) == 0


def test_a_percentile_leaves_out_the_farthest_values():
    x = inputs(outlier=1000.0)  # one of 20000 values; 2 of them may be left out
    scale = choose(seen(x), INT8, "percentile", torch.float32)
    wanted = x.abs().flatten().sort().values[-3]
    torch.testing.assert_close(scale.scale * 127.5, wanted.view(1), rtol=0.005, atol=0)
    assert 0 < clipped(seen(x), scale, INT8) <= 3e-4


def test_asymmetric_percentiles_leave_out_half_at_each_end():
    x = inputs(shift=3.0)
    scale = choose(seen(x), ASYM, "percentile", torch.float32)
    low, high = x.flatten().sort().values[[0, -2]]
    torch.testing.assert_close(scale.scale * 255, (high - low.clamp(max=0)).view(1), rtol=0.01, atol=0)


@pytest.mark.parametrize("grid", [INT8, ASYM, FP8], ids=str)
@pytest.mark.parametrize("outlier", [0.0, 60.0])
def test_least_error_is_never_worse_than_minmax(grid, outlier):
    x = inputs(outlier, shift=0.5)
    errors = [
        float((round_inputs(x, grid, choose(seen(x), grid, method, torch.float32)) - x).square().mean())
        for method in ("minmax", "mse")
    ]
    assert errors[1] <= errors[0] * 1.01
    if outlier and grid is INT8:
        assert errors[1] < 0.95 * errors[0]


def test_the_scale_is_of_the_stored_type_and_the_zero_point_fits_it():
    scale = choose(seen(inputs(shift=3.0)), ASYM, "minmax", torch.bfloat16)
    assert scale.scale.dtype == torch.bfloat16
    assert scale.zero.dtype == torch.int8
    low = float(inputs(shift=3.0).amin())
    assert int(scale.zero) == round(-128 - low / float(scale.scale))
