"""Estimators of damage and how they are judged, on numbers made by hand."""

import pytest
import torch

from quantkit.algorithms.config import RtnConfig
from quantkit.algorithms.rtn import rtn
from quantkit.allocation.groups import Group
from quantkit.bench.quality import fisher, sensitivity
from quantkit.plan import LayerPlan
from quantkit.scheme import Scheme, integer


def test_a_prediction_in_proportion_has_no_scatter():
    measured = [0.1, 0.4, 0.2, 0.9, 0.3]
    found = sensitivity._judged([2 * value for value in measured], measured)
    for name in ("rank_correlation", "log_correlation"):
        assert found[name] == pytest.approx([1, 0], abs=1e-6)
    assert found["scatter"] == pytest.approx(1)
    assert found["scale"] == pytest.approx(1 / 2)


def test_ranks_turned_round_correlate_with_minus_one():
    found = sensitivity._judged([0.5, 0.4, 0.3, 0.2], [1.0, 2.0, 4.0, 5.0])
    assert found["rank_correlation"] == pytest.approx([-1, 0], abs=1e-6)
    assert found["scatter"] > 1


def test_without_correlations_the_fisher_damage_is_half_the_squared_error():
    linear = torch.nn.Linear(16, 4, bias=False)
    weight = linear.weight.data.copy_(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    schemes = (Scheme(integer(2, 16)), Scheme(integer(8, 16)))
    layer = LayerPlan("one", (4, 16), False, 0, schemes[0], RtnConfig(name="rtn"))
    group = Group("one", 0, (layer,), False, schemes, (0, 0), 0)
    given = ({"one": linear}, {"one": torch.ones(4)}, {"one": torch.eye(16)})
    found = [fisher._damage(group, number, *given) for number in (0, 1)]
    for scheme, damage in zip(schemes, found, strict=True):
        rounded = rtn(weight, scheme.weights, torch.bfloat16, "mse").dequantize(torch.float32)
        assert damage == pytest.approx(float((rounded - weight).square().sum()) / 2)
    assert found[0] > 100 * found[1] > 0
    doubled = fisher._damage(group, 0, given[0], {"one": 2 * torch.ones(4)}, given[2])
    assert doubled == pytest.approx(2 * found[0])
