"""AWQ's searches: never worse than doing nothing, on their own measure."""

import pytest
import torch

from quantkit.scheme import integer
from quantkit.transforms.awq import candidate, clip, search_scale
from quantkit.transforms.groups import rounded

SCHEME = integer(3, 32, False)


@pytest.fixture
def layer():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 128, generator=g)
    x[:, [3, 40, 77]] *= 30  # outlier channels
    return x, torch.randn(48, 128, generator=g)


def search(x, w, loss=None, expand=None, grid=20):
    def output_error(weights):
        return float(((weights[0] - w) @ x.T).square().mean())

    mean_abs = x.abs().mean(0)
    if expand is not None:
        mean_abs = mean_abs.view(-1, int(expand.max()) + 1).mean(0)
    return search_scale(mean_abs, expand, [w], [SCHEME], torch.float32, loss or output_error, grid)


def test_scales_help_with_outlier_channels(layer):
    found = search(*layer)
    assert found.exponent is not None
    assert found.loss < 0.7 * found.identity_loss
    assert found.scale[3] > found.scale[4]


def test_identity_wins_when_every_scale_is_worse(layer):
    worse = iter(range(1, 100))
    found = search(*layer, loss=lambda weights: float(next(worse)))
    assert found.exponent is None
    assert torch.equal(found.scale, torch.ones(128))
    assert found.loss == found.identity_loss == 1


def test_shared_channels_get_one_scale(layer):
    expand = torch.arange(128) % 32
    found = search(*layer, expand=expand)
    assert found.scale.shape == (32,)
    assert found.loss <= found.identity_loss


def test_exponent_zero_is_the_identity():
    assert torch.equal(candidate(torch.tensor([0.5, 2.0, 9.0]), 0.0), torch.ones(3))


def test_dead_channels_do_not_move_the_others():
    alive = candidate(torch.tensor([0.5, 2.0, 9.0]), 0.5)
    assert torch.equal(candidate(torch.tensor([0.0, 0.5, 2.0, 9.0]), 0.5), torch.cat([torch.ones(1), alive]))
    assert torch.equal(candidate(torch.zeros(4), 0.5), torch.ones(4))


@pytest.mark.parametrize("dead", [slice(0, 1), slice(0, 32), slice(0, 128)], ids=["one", "a group", "all"])
def test_columns_without_a_signal_are_rounded_to_nearest_or_better_by_all_parts(dead):
    """Their weights stay: relative error as of the rounding alone, whatever the inputs of the others are."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(48, 128, generator=g), torch.randn(600, 128, generator=g) * torch.logspace(-1, 1, 128)
    w[:, dead] *= 3
    x[:, dead] = 0
    grid = integer(4, 32)
    columns = candidate(x.abs().mean(0), 0.5)
    scaled = rounded(w * columns, grid, torch.float32) / columns
    clipped = clip(w, x, grid, torch.float32)
    for found in (scaled, clipped, rounded(clipped, grid, torch.float32)):
        assert torch.isfinite(found).all()
        off = (found - w)[:, dead].square().sum() / w[:, dead].square().sum()
        assert off < 0.05


def test_dead_channels_are_not_scaled():
    s = candidate(torch.tensor([0.0, 1.0, 4.0]), 0.5)
    assert s[0] == 1
    assert torch.isfinite(s).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_never_raises_the_error_of_a_groups_partial_sum(layer, symmetric):
    x, w = layer
    grid = integer(3, 32, symmetric)
    clipped = clip(w, x, grid, torch.float32)

    def error(weight):
        off = (rounded(weight, grid, torch.float32) - w).view(48, 4, 32)
        return torch.einsum("ngk,tgk->ngt", off, x.view(-1, 4, 32)).square().sum(2)

    assert (error(clipped) <= error(w) * (1 + 1e-4)).all()
    assert error(clipped).sum() < 0.97 * error(w).sum()
    assert (clipped.abs() <= w.abs()).all()
