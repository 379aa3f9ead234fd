"""Collectors against direct formulas."""

import pytest
import torch

from quantkit.calibration.collect import COLLECTORS, Gatherer

FEATURES = 600  # more than one tile


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, FEATURES, generator=g) * torch.logspace(-2, 1, FEATURES)
    return x, x + 0.1 * torch.randn(x.shape, generator=g)


def gather(fields, chunks, mask=None):
    gatherer = Gatherer(frozenset(fields), FEATURES, torch.device("cpu"))
    for i, (x, full) in enumerate(chunks):
        gatherer.update(x, full, None if mask is None else mask[i])
    return gatherer.finish()


def test_statistics_equal_their_formulas_over_all_chunks(inputs):
    x, full = inputs
    found = gather(COLLECTORS, list(zip(x, full, strict=True)))
    flat, moved = x.reshape(-1, FEATURES).double(), (full - x).reshape(-1, FEATURES).double()
    assert found.tokens == 120
    torch.testing.assert_close(found.hessian.double(), 2 / 120 * flat.T @ flat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.drift.double(), 2 / 120 * moved.T @ flat, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.hessian, found.hessian.T)
    assert torch.equal(found.amax.double(), flat.abs().amax(0))
    torch.testing.assert_close(found.mean_abs.double(), flat.abs().mean(0), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.mean_square.double(), flat.square().mean(0), rtol=1e-5, atol=1e-8)


def test_masked_tokens_count_nowhere(inputs):
    x, full = inputs
    mask = torch.arange(40).ge(torch.tensor([[0], [11], [25]]))
    spoiled = torch.where(mask[:, :, None], x, 1e6)
    masked = gather(COLLECTORS, list(zip(spoiled, full, strict=True)), mask)
    kept = gather(COLLECTORS, [(x[i][mask[i]], full[i][mask[i]]) for i in range(3)])
    assert masked.tokens == kept.tokens == int(mask.sum())
    for field in ("hessian", "drift", "amax", "mean_abs", "mean_square"):
        torch.testing.assert_close(getattr(masked, field), getattr(kept, field), rtol=1e-4, atol=1e-5)


def test_drift_is_measured_where_the_full_stream_reaches(inputs):
    x, full = inputs
    short = gather({"drift", "hessian"}, [(x[0], full[0]), (x[1], None), (x[2], None)])
    alone = gather({"drift"}, [(x[0], full[0])])
    assert torch.equal(short.drift, alone.drift)
    assert short.tokens == 120


def test_half_precision_inputs_accumulate_in_fp32():
    x = torch.full((70000, 2), 1.0, dtype=torch.float16)
    gatherer = Gatherer(frozenset({"hessian"}), 2, torch.device("cpu"))
    gatherer.update(x)
    assert torch.equal(gatherer.finish().hessian, torch.full((2, 2), 2.0))


@pytest.mark.parametrize("tokens", [1, 5])
def test_inputs_that_are_zero_give_zeros_and_never_nan(tokens):
    """Also of sums that a transform divides by: amax, mean |x| and mean x^2 of a column that never fires are 0."""
    names = ("hessian", "amax", "mean_abs", "mean_square")
    gatherer = Gatherer(frozenset(names), 8, torch.device("cpu"))
    x = torch.ones(tokens, 8)
    x[:, 2:4] = 0
    gatherer.update(x, None)
    found = gatherer.finish()
    for name in names:
        assert torch.isfinite(getattr(found, name)).all()
    for name in ("amax", "mean_abs", "mean_square"):
        assert getattr(found, name)[2:4].tolist() == [0, 0]
        assert getattr(found, name)[4:].tolist() == [1] * 4
    assert found.fired.tolist() == [True, True, False, False] + [True] * 4
