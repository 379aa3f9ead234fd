"""Inputs rounded as compressed-tensors rounds them."""

import pytest
import torch

from quantkit.numerics.inputs import InputScale, input_scale, round_inputs
from quantkit.scheme import FP8_TOKEN, INT8_TOKEN, NUMBERS, Grid

X = (
    torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    * torch.tensor([1e-4, 1.0, 30.0])[:, None, None]
)
INT8, FP8, FP4 = NUMBERS["int8"], NUMBERS["fp8_e4m3"], NUMBERS["fp4_e2m1"]
MXFP8, MXFP4 = (Grid(number, "group", 32, dynamic=True, scale="e8m0") for number in (FP8, FP4))
NVFP4 = Grid(FP4, "group", 16, dynamic=True, scale="fp8_e4m3")
ASYM = Grid(INT8, "token", symmetric=False, dynamic=True)
DYNAMIC = [
    INT8_TOKEN,
    FP8_TOKEN,
    ASYM,
    Grid(INT8, "group", 32, dynamic=True),
    Grid(FP8, "group", 16, dynamic=True),
    MXFP8,
    MXFP4,
]


def test_int8_by_token_is_the_formula():
    s = X.abs().amax(-1, keepdim=True) / 127.5
    assert torch.equal(round_inputs(X, INT8_TOKEN), (X / s).round().clamp(-128, 127) * s)
    assert float((X / s).abs().max()) > 127  # both ends of the range are used


def test_fp8_by_group_is_the_formula():
    x = X.view(3, 5, 4, 16)
    s = x.abs().amax(-1, keepdim=True) / 448
    wanted = ((x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s).view(X.shape)
    assert torch.equal(round_inputs(X, Grid(FP8, "group", 16, dynamic=True)), wanted)


def test_asymmetric_rows_use_their_whole_range():
    x = X.abs() + 1  # the range still includes 0
    rounded = round_inputs(x, ASYM)
    s = x.amax(-1, keepdim=True) / 255
    assert float(((rounded - x).abs() / s).max()) <= 0.501
    assert torch.equal(round_inputs(-x, ASYM).sign(), -torch.ones_like(x))


@pytest.mark.parametrize("grid", DYNAMIC, ids=str)
def test_a_row_is_rounded_by_itself(grid):
    together = round_inputs(X, grid)
    assert torch.equal(together.flatten(0, 1), round_inputs(X.flatten(0, 1), grid))
    assert torch.equal(together[1, 2], round_inputs(X[1, 2], grid))


@pytest.mark.parametrize("grid", DYNAMIC, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_and_nothing_finite_is_lost(grid, dtype):
    x = X.to(dtype)
    x[0, 0] = 0
    rounded = round_inputs(x, grid)
    assert rounded.dtype == dtype
    assert not rounded[0, 0].any()
    assert rounded.isfinite().all()


@pytest.mark.parametrize(("zero", "low", "high"), [(None, -128, 127), (-100, -28, 227)])
def test_a_stored_range_cuts_off(zero, low, high):
    grid = Grid(INT8, "tensor", symmetric=zero is None)
    stored = InputScale(torch.tensor([0.5]), None if zero is None else torch.tensor([zero], dtype=torch.int8))
    x = torch.tensor([[-1000.0, -0.3, 0.0, 0.24, 0.26, 3.1, 1000.0]])
    assert round_inputs(x, grid, stored).tolist() == [[0.5 * low, -0.5, 0.0, 0.0, 0.5, 3.0, 0.5 * high]]
    with pytest.raises(ValueError, match="need their stored scale"):
        round_inputs(x, grid)


@pytest.mark.parametrize("low", [-3.0, -0.5, 0.25], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_range_reaches_from_end_to_end(low, dtype):
    """The zero point belongs to the scale as it is stored: no value of the range is off by more than half a step."""
    grid = Grid(INT8, "tensor", symmetric=False)
    static = input_scale(torch.tensor([low]), torch.tensor([4.0]), grid, dtype)
    x = torch.linspace(low, 4.0, 101)
    assert static.scale.dtype == dtype
    assert static.zero.dtype == torch.int8
    step = float(static.scale)
    assert step == pytest.approx((4 - min(low, 0)) / 255, rel=2**-8)
    assert float((round_inputs(x, grid, static) - x).abs().max()) <= step * (
        0.501 if dtype == torch.float32 else 1
    )


@pytest.mark.parametrize("number", [INT8, FP8], ids=str)
def test_a_symmetric_range_is_that_of_its_larger_end(number):
    static = input_scale(torch.tensor([-8.0]), torch.tensor([4.0]), Grid(number, "tensor"))
    assert static.zero is None
    assert float(static.scale) == pytest.approx(8 / (127.5 if number is INT8 else 448))
    assert float(input_scale(torch.zeros(1), torch.zeros(1), Grid(number, "tensor")).scale) > 0


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# max|x| of a group -> the byte e of its scale 2^(e - 127): of FP4, of FP8
EXPONENTS = {
    0.75: (124, 118),
    0.874: (124, 118),
    0.875: (125, 119),
    1.5: (125, 119),
    1.75: (126, 120),
    6.0: (127, 121),
    7.0: (128, 122),
}


def fp4(x):
    """The nearest value of E2M1, ties to the even code."""
    off = (x.abs()[..., None] - E2M1).abs()
    even = torch.tensor([0, 1] * 4) * 1e-6  # of two that are as near
    return E2M1[(off + even).argmin(-1)].copysign(x)


def fp8(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("largest", EXPONENTS, ids=str)
def test_scales_of_mx_groups_are_the_powers_of_two_of_compressed_tensors(largest):
    x = torch.linspace(-1, 1, 32)[None] * largest
    for grid, nearest, byte in zip((MXFP4, MXFP8), (fp4, fp8), EXPONENTS[largest], strict=True):
        scale = 2.0 ** (byte - 127)
        assert torch.equal(round_inputs(x, grid), nearest(x / scale) * scale)
    assert torch.equal(
        round_inputs(x.bfloat16(), MXFP8), round_inputs(x.bfloat16().float(), MXFP8).bfloat16()
    )


@pytest.mark.parametrize("whole", [1.0, 2352.0])
def test_nvfp4_is_the_formula(whole):
    """The second row of groups is so small that its FP8 scale is 0, which 1/8 stands for."""
    x = torch.cat([X.view(-1, 16), X.view(-1, 16)[:4] * 1e-8])
    b = fp8((x.abs().amax(-1, keepdim=True) / 6 * whole).clamp(max=448))
    scale = torch.where(b == 0, 0.125, b) / whole
    static = InputScale(torch.tensor([whole]))
    assert torch.equal(round_inputs(x, NVFP4, static), fp4(x / scale).clamp(-6, 6) * scale)
    with pytest.raises(ValueError, match="need their stored scale"):
        round_inputs(x, NVFP4)


def test_fp4_ties_go_to_the_even_code():
    x = torch.zeros(1, 16)
    x[0, :8] = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    x[0, 8:] = -x[0, :8]
    rounded = round_inputs(x, NVFP4, InputScale(torch.ones(1)))
    assert rounded[0, :8].tolist() == [6, 0, 1, 1, 2, 2, 4, 4]
    assert torch.equal(rounded[0, 8:], -rounded[0, :8])
