"""Round to nearest: grid identities and the search's own promises."""

import pytest
import torch
from rounding import assert_searches_pay

from quantkit.algorithms.config import RtnConfig
from quantkit.algorithms.rtn import quantize, rtn
from quantkit.numerics.statistics import Statistics
from quantkit.scheme import integer


def normal(n=64, k=512, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 128, None])
def test_error_is_at_most_half_a_step_and_idempotent(bits, symmetric, group):
    w, grid = normal(), integer(bits, group, symmetric)
    q = rtn(w, grid, torch.float32)
    step = q.scale.repeat_interleave(grid.group(512), 1)
    room = 1.0 if not symmetric else 0.5  # a rounded zero point may cost one end up to half a step more
    assert ((q.dequantize() - w).abs() <= step * (room + 1e-3)).all()
    assert int(q.codes.max()) <= 2**bits - 1


@pytest.mark.parametrize(
    ("grid", "target"),
    [
        (integer(4, 128), 1.236e-2),
        (integer(4, 128, False), 1.017e-2),
        (integer(3, 128), 5.67e-2),
        (integer(2, 64, False), 0.210),
        (integer(4, 32), 9.03e-3),
        (integer(8, 128), 4.28e-5),
    ],
)
def test_relative_error_on_normal_weights(grid, target):
    w = normal(256, 4096)
    error = float((rtn(w, grid, torch.float32).dequantize() - w).square().sum() / w.square().sum())
    assert error == pytest.approx(target, rel=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_is_never_worse_on_its_own_metric(bits, symmetric):
    w, grid = normal(), integer(bits, 64, symmetric)
    assert_searches_pay(w, grid, 0.95)


@pytest.mark.parametrize("grid", [integer(4, 32), integer(4, 32, False)])
@pytest.mark.parametrize("fill", [0.0, 1e-30, 3.0, -3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_groups(grid, fill, dtype):
    w = torch.full((2, 64), fill)
    q = rtn(w, grid, dtype, "mse")
    assert torch.isfinite(q.scale).all()
    assert (q.scale > 0).all()
    torch.testing.assert_close(q.dequantize(), w, rtol=0.13, atol=1e-4)
    if fill == 0:
        assert (q.dequantize() == 0).all()


def test_codes_come_from_the_stored_scale():
    w = normal()
    q = rtn(w, integer(4, 128), torch.bfloat16)
    assert q.scale.dtype == torch.bfloat16
    s = q.scale.float().repeat_interleave(128, 1)
    assert torch.equal(q.codes.float(), ((w / s).round() + 8).clamp(0, 15))


def test_scaling_by_a_power_of_two_scales_the_result():
    w, grid = normal(), integer(3, 64, False)
    a, b = rtn(w, grid, torch.float32, "mse"), rtn(4 * w, grid, torch.float32, "mse")
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(4 * a.dequantize(), b.dequantize())


def test_rows_are_independent():
    w, grid = normal(), integer(4, 128)
    assert torch.equal(rtn(w, grid, torch.float32).codes.flip(0), rtn(w.flip(0), grid, torch.float32).codes)


@pytest.mark.parametrize(("dead", "noted"), [(4, False), (40, True), (128, True)])
def test_many_columns_without_a_signal_are_noted(dead, noted):
    importance = torch.ones(128)
    importance[:dead] = 0
    config = RtnConfig(name="rtn", range="weighted")
    grid = integer(4, 32)
    found = quantize(normal(16, 128), Statistics(9, mean_square=importance), grid, torch.float16, config)
    assert any(f"{dead} of 128 columns are dead" in note for note in found.fallbacks) is noted
    plain = quantize(normal(16, 128), Statistics(), grid, torch.float16, RtnConfig(name="rtn", range="mse"))
    assert plain.fallbacks == []
