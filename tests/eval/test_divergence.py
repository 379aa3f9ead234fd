"""KL against PyTorch's own in fp64, and quantiles by hand."""

import pytest
import torch
from quantkit_eval.divergence import summary, token_agreement, token_kl
from torch.nn import functional

F64 = torch.float64


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(50, 97, generator=generator) for _ in range(2)]


def test_kl_is_that_of_the_baseline_to_the_model(logits):
    ours, base = logits
    expected = functional.kl_div(
        ours.double().log_softmax(-1), base.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    found = token_kl(base.log_softmax(-1), ours.log_softmax(-1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    swapped = token_kl(ours.log_softmax(-1), base.log_softmax(-1))
    assert not torch.allclose(found, swapped, rtol=1e-2)


def test_kl_of_a_distribution_to_itself_is_zero(logits):
    log_p = logits[0].log_softmax(-1)
    assert token_kl(log_p, log_p).abs().max() == 0


def test_kl_by_hand():
    base, ours = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert token_kl(base, ours).item() == pytest.approx(0.5 * torch.log(torch.tensor(4 / 3)).item(), rel=1e-5)


def test_agreement_counts_equal_likeliest_tokens():
    base = torch.tensor([[3.0, 1.0], [0.0, 2.0], [5.0, 4.0]])
    ours = torch.tensor([[2.0, 1.0], [2.0, 0.0], [9.0, 0.0]])
    assert token_agreement(base, ours).tolist() == [True, False, True]


def test_summary_by_hand():
    kl = [torch.tensor([4.0, 1.0]), torch.tensor([2.0, 3.0])]
    found = summary(kl, torch.tensor([2.0, 1.0], dtype=F64), torch.tensor([2.0, 2.0], dtype=F64))
    assert found["kl_mean"] == 2.5
    assert found["kl_mean_se"] == 0  # both windows have the same mean
    assert (found["kl_median"], found["kl_p99"], found["kl_max"]) == (2.0, 4.0, 4.0)
    assert found["kl_windows"] == 2
    assert found["top1_agreement"] == 0.75
    assert found["top1_agreement_se"] == pytest.approx(0.25)  # window shares 1 and 0.5


def test_the_error_of_p99_is_that_of_the_share_of_tokens_below_it():
    torch.manual_seed(0)
    windows, tokens, found = 64, 500, []
    for _ in range(40):
        kl = list(torch.distributions.Exponential(1.0).sample((windows, tokens)))
        counts = torch.full((windows,), float(tokens), dtype=F64)
        found.append(summary(kl, torch.zeros(windows, dtype=F64), counts))
    spread = torch.tensor([each["kl_p99"] for each in found]).std()
    said = torch.tensor([each["kl_p99_se"] for each in found]).mean()
    assert 0.7 < spread / said < 1.4
    assert summary([torch.ones(9)], torch.zeros(1, dtype=F64), torch.tensor([9.0]))["kl_p99_se"] is None


def test_p99_leaves_the_last_hundredth_above():
    kl = [torch.arange(1.0, 201.0)]
    found = summary(kl, torch.tensor([0.0], dtype=F64), torch.tensor([200.0], dtype=F64))
    assert (found["kl_median"], found["kl_p99"], found["kl_max"]) == (100.0, 198.0, 200.0)
    assert found["kl_mean_se"] is None
