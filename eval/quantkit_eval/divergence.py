"""How far a model's next-token distributions are from a baseline's: KL per token and top-1 agreement."""

from __future__ import annotations

import math

import torch

from quantkit_eval.errors import BrokenModel
from quantkit_eval.perplexity import ratio


def log_probabilities(logits: torch.Tensor, number: int, which: int) -> torch.Tensor:
    """fp32, from logits of window `number` of the model (which = 0) or the baseline (1); BrokenModel if not finite."""
    if not bool(torch.isfinite(logits).all()):
        raise BrokenModel(
            f"the {('model', 'baseline')[which]} gives non-finite logits in window {number}; it is broken, or its "
            "dtype too narrow (try float32)"
        )
    return logits.float().log_softmax(-1)


def token_kl(base: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL(baseline || model) of each token [n], in nats, from fp32 log-probabilities [n, vocabulary]."""
    return (base.exp() * (base - log_p)).sum(-1)


def token_agreement(base: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Whether both find the same token likeliest: bool [n]."""
    return base.argmax(-1) == log_p.argmax(-1)


def summary(
    kl: list[torch.Tensor], agreed: torch.Tensor, counts: torch.Tensor
) -> dict[str, float | int | None]:
    """The report's fields. kl: per window, fp32 [its tokens]; agreed, counts: fp64 [windows].

    median and p99 are nearest-rank: values that occurred.
    """
    mean, mean_se = ratio(torch.stack([window.double().sum() for window in kl]), counts)
    agreement, agreement_se = ratio(agreed, counts)
    ordered = torch.cat(kl).sort().values
    p99 = rank(ordered, 0.99)
    return {
        "kl_mean": mean,
        "kl_mean_se": mean_se,
        "kl_median": rank(ordered, 0.5),
        "kl_p99": p99,
        "kl_p99_se": _rank_se(kl, ordered, 0.99, p99, counts),
        "kl_max": float(ordered[-1]),
        "kl_windows": len(kl),
        "top1_agreement": agreement,
        "top1_agreement_se": agreement_se,
    }


def rank(ordered: torch.Tensor, share: float) -> float:
    """The nearest-rank quantile of sorted values: one that occurred."""
    return float(ordered[min(max(math.ceil(share * len(ordered)), 1), len(ordered)) - 1])


def _rank_se(
    kl: list[torch.Tensor], ordered: torch.Tensor, share: float, value: float, counts: torch.Tensor
) -> float | None:
    """The standard error of a quantile over windows (Woodruff 1952): that of the share of tokens up to `value`, carried
    over to the values that have this share more, or less, below them. None with a single window.
    """
    below = torch.stack([(window <= value).double().sum() for window in kl])
    se = ratio(below, counts)[1]
    return None if se is None else (rank(ordered, share + se) - rank(ordered, share - se)) / 2
