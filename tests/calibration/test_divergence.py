"""KL from logits, also where it is far below the rounding of a log-probability."""

import pytest
import torch

from quantkit.calibration.divergence import token_kl


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 1.0])
def test_kl_is_that_of_float64_however_small(noise):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(16, 1000, generator=generator)
    other = logits + noise * torch.randn(16, 1000, generator=generator)
    p, q = (z.double().log_softmax(-1) for z in (logits, other))
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    found = token_kl(logits.softmax(-1), logits, other.clone()).double().mean()
    assert float(found) == pytest.approx(float(wanted), rel=1e-2 if noise < 1e-3 else 1e-4)


def test_kl_to_itself_is_zero():
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(1))
    assert token_kl(logits.softmax(-1), logits, logits.clone()).abs().max() < 1e-6
