"""GPTQ where calibration says little: columns without a signal, Hessians that are barely positive definite."""

import pytest
import torch

from quantkit.algorithms.config import GptqConfig
from quantkit.algorithms.gptq import quantize
from quantkit.algorithms.rtn import rtn
from quantkit.calibration.collect import Gatherer
from quantkit.scheme import integer

K = 128
OPTIONS = [
    {},
    {"order": "none", "groups": "dynamic"},
    {"order": "group_aware", "refine": 0},
    {"range": "weighted"},
]
each = pytest.mark.parametrize("options", OPTIONS, ids=str)


def weight_of(n=24, seed=1):
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


def inputs(tokens=400, dead=()):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, K, generator=g) @ torch.randn(K, K, generator=g) * torch.logspace(-1, 1, K)
    x[:, list(dead)] = 0
    return x


def run(weight, x, full=None, grid=None, **options):
    gatherer = Gatherer(frozenset({"hessian", "drift", "mean_square"}), K, torch.device("cpu"))
    gatherer.update(x, x if full is None else full)
    config = GptqConfig(**{"name": "gptq", **options})
    return quantize(weight.clone(), gatherer.finish(), grid or integer(4, 32, False), torch.bfloat16, config)


def steps_off(weight, quantized):
    """|w - w_hat| / s [N, K]."""
    scale = quantized.scale.float().repeat_interleave(32, 1)
    return (quantized.dequantize() - weight).abs() / scale


@each
def test_dead_columns_keep_their_nearest_value(options):
    dead = [3, 40, 41, 90]
    w = weight_of()
    out = run(w, inputs(dead=dead), **options)
    assert out.details["dead_columns"] == 4
    assert not out.fallbacks
    scale, zero = (t.float().repeat_interleave(32, 1)[:, dead] for t in (out.weight.scale, out.weight.zero))
    nearest = ((w[:, dead] / scale).round() + zero).clamp(0, 15)
    assert torch.equal(out.weight.codes[:, dead].float(), nearest)
    assert (nearest != zero).any()


def test_all_columns_dead_is_rounding():
    w = weight_of()
    out = run(w, inputs(dead=range(K)))
    plain = rtn(w, integer(4, 32, False), torch.bfloat16, "mse")
    assert torch.equal(out.weight.codes, plain.codes)
    assert out.details["dead_columns"] == K
    assert any("128 of 128 columns are dead" in text for text in out.fallbacks)
    assert 0 < float(out.error.sum() / out.norm.sum()) < 0.02


@pytest.mark.parametrize(("dead", "told"), [(6, False), (7, True)])
def test_dead_columns_are_noted_above_a_share(dead, told):
    out = run(weight_of(), inputs(dead=range(dead)))
    assert any(f"{dead} of 128 columns are dead" in text for text in out.fallbacks) == told


def test_dead_columns_do_not_change_the_others_damping_or_codes():
    """Per-channel grids from the range alone: the live columns are quantized as if the dead ones were not there."""
    dead = list(range(16))
    w = weight_of()
    w[:, dead] *= 0.1
    x = inputs(dead=dead)
    kind = {"grid": integer(8, None), "range": "minmax", "refine": 0, "order": "none", "damping": 0.0}
    out = run(w, x, **kind).weight
    again = run(
        torch.cat([w[:, 16:], w[:, 16:32] * 0], 1), torch.cat([x[:, 16:], x[:, :16]], 1), **kind
    ).weight
    assert torch.equal(out.codes[:, 16:], again.codes[:, :-16])


def test_inputs_whose_squares_underflow_are_not_dead():
    x = inputs() * 1e-28
    assert float((x * x).max()) == 0
    w = weight_of()
    out = run(w, x)
    assert out.details["dead_columns"] == 0
    assert any("128 of 128 columns are rounded to nearest: the squares" in text for text in out.fallbacks)
    assert torch.equal(out.weight.codes, rtn(w, integer(4, 32, False), torch.bfloat16, "mse").codes)


def test_small_inputs_with_dead_columns_are_solved_as_large_ones():
    """What stands in for a dead column's signal follows the size of the others'."""
    w, x = weight_of(), inputs(dead=range(8))
    assert torch.equal(run(w, x).weight.codes, run(w, x * 2.0**-20).weight.codes)


@pytest.mark.parametrize("damping", [0.0, 1e-9, 1e-7])
@pytest.mark.parametrize("tokens", [2, 50, 127, 128, 129])
def test_little_damping_is_raised_before_rounding_errors_are_inverted(damping, tokens):
    """A nearly singular Hessian passes Cholesky by rounding errors, and its inverse blows these up."""
    g = torch.Generator().manual_seed(2)
    x = inputs(tokens)
    w = weight_of()
    out = run(w, x, x * (1 + 0.05 * torch.randn(x.shape, generator=g)), damping=damping)
    assert out.weight.relative_error(w) < 10
    if tokens < K:
        assert out.details["damping"] >= 1e-4
        assert any("damping raised to" in text for text in out.fallbacks)


def test_damping_0_is_used_where_the_hessian_allows_it():
    x = torch.randn(1000, K, generator=torch.Generator().manual_seed(0))
    out = run(weight_of(), x, damping=0.0)
    assert out.details["damping"] == 0
    assert not out.fallbacks
