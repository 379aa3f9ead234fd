"""Every algorithm and AWQ's parts on number formats that are no integers: the same properties hold."""

import pytest
import torch
from rounding import assert_searches_pay

from quantkit.algorithms.columns import ColumnGrid, solve, sweep
from quantkit.algorithms.config import GptqConfig
from quantkit.algorithms.gptq import damped, inverse_factor, quantize
from quantkit.algorithms.rtn import rtn
from quantkit.numerics.number import decode, encode
from quantkit.numerics.range_search import search_grid
from quantkit.numerics.statistics import Statistics
from quantkit.scheme import NUMBERS, PRESETS, Grid
from quantkit.transforms.awq import clip, rounded

NAMES = ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4")
GRIDS = [
    *(Grid(NUMBERS[name], "group", 32) for name in NAMES),
    *(Grid(NUMBERS[name], "channel") for name in NAMES),
    *(PRESETS[name].weights for name in ("NVFP4A16", "MXFP4A16", "FP8")),
    Grid(NUMBERS["fp8_e4m3"], "block", 32),  # of 48 rows: the last are half a block
    Grid(NUMBERS["int8"], "tensor"),
]
each = pytest.mark.parametrize("grid", GRIDS, ids=str)


def weight_of(n=48, k=128, seed=1, dtype=torch.float64):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(k=128, tokens=600):
    """[tokens, K] with correlated channels of different sizes."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(k, k, generator=g, dtype=torch.float64) / k**0.5 + torch.eye(k, dtype=torch.float64)
    x = torch.randn(tokens, k, generator=g, dtype=torch.float64) @ mix
    return x * torch.logspace(-1, 1, k, dtype=torch.float64)[torch.randperm(k, generator=g)]


def gptq(weight, x, grid, **options):
    h = 2 * x.T @ x / len(x)
    plain = {"name": "gptq", "range": "minmax", "refine": 0, "retarget": 0.0}
    return quantize(weight, Statistics(len(x), h), grid, torch.float32, GptqConfig(**plain | options)).weight


def loss(weight, quantized, x):
    return float(((weight - quantized.dequantize(weight.dtype)) @ x.T).square().sum())


@pytest.mark.parametrize(
    ("grid", "target"),
    [
        (Grid(NUMBERS["nf4"], "group", 64), 8.45e-3),  # algorithms.md, 2.1
        (Grid(NUMBERS["fp8_e4m3"], "channel"), 7.05e-4),
    ],
    ids=str,
)
def test_relative_error_on_normal_weights(grid, target):
    w = weight_of(256, 1024, dtype=torch.float32)
    error = float((rtn(w, grid, torch.float32).dequantize() - w).square().sum() / w.square().sum())
    assert error == pytest.approx(target, rel=0.05)


@each
def test_rtn_takes_the_nearest_value_of_its_grid(grid):
    w = weight_of(8, dtype=torch.float32)
    q = rtn(w, grid, torch.bfloat16)
    levels = decode(torch.arange(2**grid.bits), grid.number)
    values = levels[torch.isfinite(levels)] * q.scales()[:, :, None]  # (N, K/G, levels)
    off = (w.view(8, -1, grid.group(128), 1) - values[:, :, None]).abs().amin(3)
    torch.testing.assert_close((q.dequantize() - w).abs().view(off.shape), off, rtol=1e-4, atol=1e-6)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_again_changes_nothing(grid, dtype):
    q = rtn(weight_of(dtype=torch.float32), grid, dtype)
    s = q.scales().repeat_interleave(grid.group(128), 1)
    assert torch.equal(encode(q.dequantize() / s, grid.number), q.codes)
    assert q.zero is None


@each
@pytest.mark.parametrize("fill", [0.0, 3.0, -3.0])
def test_constant_groups(grid, fill):
    q = rtn(torch.full((2, 128), fill), grid, torch.bfloat16, "mse")
    torch.testing.assert_close(q.dequantize(), torch.full((2, 128), fill), rtol=0.05, atol=0)


@each
def test_search_and_refit_are_never_worse(grid):
    w = weight_of(dtype=torch.float32)
    assert_searches_pay(w, grid, 1)


@each
@pytest.mark.parametrize("order", ["none", "activation", "group_aware"])
def test_gptq_beats_rounding(grid, order):
    x, w = inputs(), weight_of()
    assert loss(w, gptq(w, x, grid, order=order), x) <= 0.9 * loss(w, rtn(w, grid, torch.float32), x)


@each
def test_gptq_blocked_equals_columnwise(grid):
    x, w = inputs(), weight_of()
    one = gptq(w, x, grid, block=1)
    for block in (7, 64, 128):
        assert torch.equal(gptq(w, x, grid, block=block).codes, one.codes)


@each
def test_gptq_of_a_diagonal_hessian_is_rounding(grid):
    w = weight_of()
    x = torch.diag(torch.logspace(-1, 1, 128, dtype=torch.float64))
    assert torch.equal(gptq(w, x, grid).codes, rtn(w, grid, torch.float32).codes)


@each
def test_gptq_error_identity_and_sweeps(grid):
    """tr(E H E^T) = sum Err^2 after the column loop, and each sweep lowers it by what it says."""
    x, w = inputs(), weight_of()
    h = damped(2 * x.T @ x / len(x), 0.01)
    scale, zero = search_grid(w, grid, torch.float32)
    groups = torch.arange(128) // grid.group(128)
    grids = ColumnGrid(scale.T.contiguous()[None], zero.T.contiguous()[None], groups[None])
    levels, errors = solve(w.T.clone().contiguous()[None], inverse_factor(h)[None], grids, grid, 32)

    def objective():
        off = w.T - grids.values(levels)[0]
        return float((off * (h @ off)).sum())

    before = objective()
    assert before == pytest.approx(float(errors.square().sum()), rel=1e-9)
    _, gained = sweep(w.T[None], h[None], levels, grids, grid, 3)
    assert objective() == pytest.approx(before + float(gained.sum()), rel=1e-9)
    assert gained.sum() < 0
    torch.testing.assert_close(decode(encode(levels, grid.number), grid.number, dtype=levels.dtype), levels)


@each
def test_dynamic_groups_come_from_the_updated_weight(grid):
    x, w = inputs(), weight_of()
    q = gptq(w, x, grid, groups="dynamic", order="none")
    assert loss(w, q, x) < loss(w, rtn(w, grid, torch.float32), x)


@each
def test_awq_rounds_and_clips(grid):
    w = weight_of(dtype=torch.float32)
    assert torch.equal(rounded(w, grid, torch.float32), rtn(w, grid, torch.float32).dequantize())
    sample = inputs().float()[:256]
    clipped = clip(w, sample, grid, torch.float32)

    def error(weight):
        off = (rounded(weight, grid, torch.float32) - w).view(48, -1, grid.group(128)).transpose(0, 1)
        return (off @ sample.view(256, -1, grid.group(128)).permute(1, 2, 0)).square().sum()

    assert error(clipped) <= error(w) * (1 + 1e-5)
