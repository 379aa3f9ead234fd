"""Properties of GPTQ that hold whatever the model (algorithms.md, section 20)."""

import itertools

import pytest
import torch

from quantkit.algorithms.columns import ColumnGrid, solve, sweep
from quantkit.algorithms.config import GptqConfig
from quantkit.algorithms.gptq import column_order, damped, inverse_factor, quantize, quantize_all
from quantkit.algorithms.rtn import rtn
from quantkit.numerics.number import encode
from quantkit.numerics.range_search import search_grid
from quantkit.numerics.statistics import Statistics
from quantkit.scheme import PRESETS, integer

PLAIN = {"name": "gptq", "order": "none", "range": "minmax", "refine": 0, "retarget": 0.0}


def correlated(k: int, tokens: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """X [tokens, K] with strongly correlated channels of different sizes."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g, dtype=dtype) / k**0.5 + torch.eye(k, dtype=dtype)
    return (
        torch.randn(tokens, k, generator=g, dtype=dtype)
        @ mix
        * torch.logspace(-1, 1, k, dtype=dtype)[torch.randperm(k, generator=g)]
    )


def weight_of(n: int, k: int, seed: int = 1, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(weight, x, grid, **options):
    h = 2 * x.T @ x / len(x)
    config = GptqConfig(**{**PLAIN, **options})
    drift = torch.zeros_like(h) if config.retarget else None
    return quantize(weight, Statistics(len(x), h, drift), grid, torch.float32, config)


def grid_of(scale, zero, groups):
    """The grid of the columns of a single weight."""
    return ColumnGrid(scale.T.contiguous()[None], zero.T.contiguous()[None], groups[None])


def loss(weight, quantized, x):
    return float(((weight - quantized.dequantize(weight.dtype)) @ x.T).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["none", "activation", "group_aware"])
def test_error_identity(bits, symmetric, order):
    """tr((W - Q) H (W - Q)^T) = sum Err^2 to 1e-9 in fp64, for any grid, clamp and order."""
    k, grid = 96, integer(bits, 32, symmetric)
    h = damped(2 * correlated(k, 300).T @ correlated(k, 300) / 300, 0.01)
    w = weight_of(20, k)
    perm = column_order(h.diagonal(), 32, order)
    h, w = h[perm][:, perm], w[:, perm]
    scale, zero = search_grid(weight_of(20, k), grid, torch.float32)
    grids = grid_of(scale, zero, perm // 32)
    q, err = solve(w.T.clone().contiguous()[None], inverse_factor(h)[None], grids, grid, 40)
    off = w.T - grids.values(q)[0]
    assert float((off * (h @ off)).sum()) == pytest.approx(float(err.square().sum()), rel=1e-9)


@pytest.mark.parametrize("order", ["none", "activation"])
def test_blocked_equals_columnwise(order):
    x, w = correlated(128, 400), weight_of(24, 128)
    reference = run(w, x, integer(3, 32), order=order, block=1).weight.codes
    for block in (8, 48, 128, 500):
        assert torch.equal(run(w, x, integer(3, 32), order=order, block=block).weight.codes, reference)


@pytest.mark.parametrize("options", [{}, {"refine": 3, "order": "activation"}, {"groups": "dynamic"}])
def test_rows_solved_in_chunks_give_the_same_codes(options, monkeypatch):
    x, w = correlated(128, 400), weight_of(24, 128)
    whole = run(w, x, integer(3, 32, False), retarget=0.5, **options)
    monkeypatch.setattr("quantkit.algorithms.gptq.CHUNK_ELEMENTS", 7 * 128)
    parts = run(w, x, integer(3, 32, False), retarget=0.5, **options)
    assert torch.equal(parts.weight.codes, whole.weight.codes)
    assert torch.equal(parts.weight.zero, whole.weight.zero)
    torch.testing.assert_close(parts.error, whole.error)
    torch.testing.assert_close(parts.norm, whole.norm)


@pytest.mark.parametrize("options", [{}, {"order": "activation"}, {"groups": "dynamic"}, {"refine": 3}])
def test_identity_hessian_gives_rtn_codes(options):
    w, grid = weight_of(16, 128), integer(4, 32, False)
    config = GptqConfig(**{**PLAIN, **options})
    out = quantize(w, Statistics(1, torch.eye(128, dtype=w.dtype)), grid, torch.float32, config)
    assert torch.equal(out.weight.codes, rtn(w, grid, torch.float32).codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["none", "activation", "group_aware"])
def test_layer_loss_is_well_below_rtn(bits, order):
    x, w, grid = correlated(128, 600), weight_of(48, 128), integer(bits, 32)
    ours = loss(w, run(w, x, grid, order=order).weight, x)
    assert ours <= 0.9 * loss(w, rtn(w, grid, torch.float32), x)


def test_sweeps_are_monotone_and_help():
    x, w, grid = correlated(128, 600), weight_of(48, 128), integer(3, 32)
    h = damped(2 * x.T @ x / len(x), 0.01)
    scale, zero = search_grid(w, grid, torch.float32)
    grids = grid_of(scale, zero, torch.arange(128) // 32)
    q, _ = solve(w.T.clone().contiguous()[None], inverse_factor(h)[None], grids, grid, 32)

    def objective():
        off = w.T - grids.values(q)[0]
        return float((off * (h @ off)).sum())

    values = [objective()]
    for panel in (1000, 48, 40, 128):
        _, gained = sweep(w.T[None], h[None], q, grids, grid, 1, block=40, panel=panel)
        values.append(objective())
        assert values[-1] - values[-2] == pytest.approx(float(gained.sum()), rel=1e-9, abs=1e-12)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(values))
    assert values[-1] < 0.98 * values[0]


@pytest.mark.parametrize("options", [{}, {"refine": 3}, {"order": "activation"}, {"groups": "dynamic"}])
def test_reported_error_is_that_of_the_codes(options):
    """The loops keep count of it instead of multiplying by H once more."""
    x, w = correlated(300, 800), weight_of(24, 300)
    out = run(w, x, integer(3, 60, False), **options)
    h = damped(2 * x.T @ x / len(x), out.details["damping"])
    off = w - out.weight.dequantize(w.dtype)
    torch.testing.assert_close(out.error, (off @ h * off).sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.norm, (w @ h * w).sum(1))


def test_positive_multiple_of_hessian_changes_nothing():
    x, w = correlated(64, 300), weight_of(8, 64)
    a = run(w, x, integer(4, 32), refine=2).weight.codes
    assert torch.equal(a, run(w, x * 4, integer(4, 32), refine=2).weight.codes)


def test_column_permutation_commutes_with_activation_order():
    """Per-channel scales: permuting the columns of W and H together permutes the codes."""
    x, w, perm = (
        correlated(64, 300),
        weight_of(8, 64),
        torch.randperm(64, generator=torch.Generator().manual_seed(3)),
    )
    grid = integer(4, None)
    a = run(w, x, grid, order="activation").weight.codes
    b = run(w[:, perm], x[:, perm], grid, order="activation").weight.codes
    assert torch.equal(a[:, perm], b)


def test_loss_falls_with_bits():
    x, w = correlated(64, 300), weight_of(16, 64)
    losses = [loss(w, run(w, x, integer(b, 32)).weight, x) for b in (2, 3, 4, 8)]
    assert losses == sorted(losses, reverse=True)


def test_weight_already_on_the_grid_is_unchanged():
    x, grid = correlated(64, 300), integer(4, 32)
    h = damped(2 * x.T @ x / len(x), 0.01)
    scale, zero = search_grid(weight_of(16, 64), grid, torch.float32)
    grids = grid_of(scale, zero, torch.arange(64) // 32)
    before = rtn(weight_of(16, 64), grid, torch.float32)
    q, err = solve(
        before.dequantize(torch.float64).T.contiguous()[None], inverse_factor(h)[None], grids, grid, 32
    )
    assert torch.equal(encode(q, grid.number)[0].T, before.codes)
    assert float(err.abs().max()) < 1e-9


@pytest.mark.parametrize("tokens", [4, 64])
def test_singular_hessian_is_damped_and_reported(tokens):
    """Damping 0 on a rank-deficient H fails first; the ladder saves it or RTN does, and either is in the report."""
    x = correlated(64, tokens)
    x[:, 1] = x[:, 0]
    h = 2 * x.T @ x / len(x)
    h -= 1e-3 * torch.eye(64, dtype=h.dtype) * h.diagonal().mean()  # now indefinite
    config = GptqConfig(**{**PLAIN, "damping": 1e-4})
    out = quantize(weight_of(8, 64), Statistics(tokens, h), integer(4, 32), torch.float32, config)
    assert out.fallbacks
    assert torch.isfinite(out.weight.scale).all()


def test_retarget_follows_the_full_precision_inputs():
    """||W X - Q X~||^2 falls on correlated drift, in sample and on held-out tokens; no drift changes nothing."""
    k, grid = 128, integer(4, 32)
    g = torch.Generator().manual_seed(5)
    move = (
        torch.eye(k, dtype=torch.float64)
        + 0.05 * torch.randn(k, k, generator=g, dtype=torch.float64) / k**0.5
    )

    every = correlated(k, 2400)
    every_moved = every @ move + 0.01 * torch.randn(every.shape, generator=g, dtype=every.dtype)
    (x, held_x), (moved, held_moved) = every.split(1200), every_moved.split(1200)
    w = weight_of(64, k)
    h, d = 2 * moved.T @ moved / 1200, 2 * (x - moved).T @ moved / 1200

    def output_error(strength, x, moved):
        config = GptqConfig(**{**PLAIN, "retarget": strength})
        out = quantize(w, Statistics(1200, h.clone(), d.clone()), grid, torch.float32, config)
        return float((x @ w.T - moved @ out.weight.dequantize(w.dtype).T).square().sum())

    assert output_error(1.0, x, moved) < 0.8 * output_error(0.0, x, moved)
    assert output_error(1.0, held_x, held_moved) < 0.8 * output_error(0.0, held_x, held_moved)
    still = run(w, moved, grid, retarget=1.0).weight.codes
    assert torch.equal(still, run(w, moved, grid).weight.codes)


def test_dynamic_groups_see_pending_updates():
    """A group's grid is taken from the weight as updated so far: the result must not depend on `block`."""
    x, w, grid = correlated(128, 400), weight_of(24, 128), integer(3, 16)
    a = run(w, x, grid, groups="dynamic", block=128)
    b = run(w, x, grid, groups="dynamic", block=16)
    assert torch.equal(a.weight.scale, b.weight.scale)
    assert not torch.equal(a.weight.scale, rtn(w, grid, torch.float32).scale)


@pytest.mark.parametrize(
    "grid",
    [integer(3, 32), integer(4, 32, False), PRESETS["NVFP4A16"].weights, integer(8, None)],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [{}, {"order": "activation", "refine": 3, "range": "mse", "retarget": 1.0}, {"groups": "dynamic"}],
)
def test_weights_solved_as_one_batch_are_those_solved_alone(grid, options):
    """In fp64, where the order of a sum decides no code; the second Hessian is singular and takes another way."""
    weights = [weight_of(24, 128, seed) for seed in range(3)]
    inputs = [correlated(128, tokens, seed) for seed, tokens in enumerate((400, 20, 300))]
    config = GptqConfig(**{**PLAIN, **options})

    def statistics(x):
        h = 2 * x.T @ x / len(x)
        return Statistics(len(x), h, 0.01 * h if config.retarget else None, mean_square=h.diagonal() / 2)

    together = quantize_all(weights, [statistics(x) for x in inputs], grid, torch.float32, config)
    for found, w, x in zip(together, weights, inputs, strict=True):
        alone = quantize(w, statistics(x), grid, torch.float32, config)
        assert torch.equal(found.weight.codes, alone.weight.codes)
        assert torch.equal(found.weight.scale, alone.weight.scale)
        torch.testing.assert_close(found.error, alone.error)
        torch.testing.assert_close(found.norm, alone.norm)
        assert (found.details, found.fallbacks) == (alone.details, alone.fallbacks)
        torch.testing.assert_close(found.weight.global_scale, alone.weight.global_scale)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block": 500, "order": "activation"},
        {"groups": "dynamic"},
        {"refine": 3, "retarget": 1.0, "block": 96},
    ],
)
@pytest.mark.parametrize("group", [32, 256])
def test_single_precision_is_as_good_as_double(options, group):
    """The kernels that single precision runs on against torch's ops: few codes differ, the error is the same."""
    x, w, grid = correlated(512, 900), weight_of(40, 512), integer(3, group)

    def solved(dtype):
        return run(w.to(dtype), x.to(dtype), grid, **options)

    single, double = solved(torch.float32), solved(torch.float64)
    assert (single.weight.codes != double.weight.codes).float().mean() < 0.1
    assert loss(w, single.weight, x) == pytest.approx(loss(w, double.weight, x), rel=0.01)
    torch.testing.assert_close(single.error.sum().double(), double.error.sum(), rtol=0.01, atol=0)
