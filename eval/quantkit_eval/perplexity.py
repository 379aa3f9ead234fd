"""Mean NLL and perplexity with standard errors over windows.

Tokens of one window depend on each other, windows nearly not, so a mean over tokens is a ratio of window sums,
r = sum s_w / sum t_w (s_w: the window's sum, t_w: its tokens), with the ratio estimator's error (Cochran,
Sampling Techniques, 2.11)

    se = sqrt(n / (n - 1) sum (s_w - r t_w)^2) / sum t_w

which for windows of equal length is the standard error of the mean of the window means.
"""

from __future__ import annotations

import math

import torch

from quantkit_eval.errors import BrokenModel
from quantkit_eval.report import Fit

_MOST_NATS = 700.0  # exp of it still fits a float


def token_nll(log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """NLL of each target [n] under log-probabilities [n, vocabulary], in nats."""
    return -log_p.gather(1, targets.to(log_p.device)[:, None])[:, 0]


def ratio(sums: torch.Tensor, counts: torch.Tensor) -> tuple[float, float | None]:
    """sum(sums) / sum(counts) and its standard error (None for a single window); both fp64 [windows]."""
    value = sums.sum() / counts.sum()
    n = len(sums)
    if n < 2:
        return float(value), None
    spread = (sums - value * counts).square().sum() * n / (n - 1)
    return float(value), float(spread.sqrt() / counts.sum())


def fit(sums: torch.Tensor, counts: torch.Tensor) -> Fit:
    """Perplexity from NLL sums and token counts [windows]; its error by the delta method, ppl * se(nll)."""
    nll, se = ratio(sums, counts)
    if nll > _MOST_NATS:
        raise BrokenModel(f"the mean NLL is {nll:.4g} nats per token: the model is broken")
    perplexity = math.exp(nll)
    return Fit(perplexity, None if se is None else perplexity * se, nll, se)
