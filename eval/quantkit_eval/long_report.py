"""The result of comparing long texts: divergence by position, where texts part, repetition and loops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from quantkit_eval.perplexity import ratio
from quantkit_eval.sampler import Sampling

SCHEMA = "quantkit-long/1"
BUCKETS = 10  # points of the curve
GRAM = 4  # tokens of a phrase whose return counts as repetition
ROUNDS = 3  # times that the end of a text must be the same tokens to be a loop
_LEAST_LOOP = 12  # tokens of such an end


class Text(NamedTuple):
    """One prompt: the tokens of the model and of the baseline; KL and agreement fp64 [tokens] along the baseline's."""

    tokens: list[int]
    base: list[int]
    kl: torch.Tensor
    agreed: torch.Tensor


@dataclass(frozen=True)
class Bucket:
    """The new tokens first to last (counted from 1, both included) of all texts.

    kl_mean: KL(baseline || model) per token in nats; kl_mean_se: its standard error over texts, None for one. parted:
    share of the texts in which the model's own tokens differ from the baseline's by the last of them.
    """

    first: int
    last: int
    kl_mean: float
    kl_mean_se: float | None
    top1_agreement: float
    parted: float


@dataclass(frozen=True)
class Writing:
    """Texts written one way. Lists have an entry for each text, and positions count new tokens from 1.

    first_difference: where the model's text leaves the baseline's, None: nowhere. repetition: seq-rep-4 (Welleck et al.
    2020, section 6.1), 1 - distinct / all 4-grams of a text's new tokens. repetition_difference: mean over texts of the
    model's minus the baseline's, with its standard error. loops: where a loop begins that the text ends in, the same
    tokens ROUNDS times or more; None: it ends in none.
    """

    way: str
    temperature: float
    seed: int | None
    kl_mean: float
    kl_mean_se: float | None
    kl_max: float
    top1_agreement: float
    first_difference: list[int | None]
    repetition: list[float]
    repetition_baseline: list[float]
    repetition_difference: float
    repetition_difference_se: float | None
    loops: list[int | None]
    loops_baseline: list[int | None]
    curve: list[Bucket]


@dataclass(frozen=True)
class LongReport:
    """Long texts of a model against those of a baseline. cache: the model's key-value cache, None: its own."""

    sequences: int
    prompt_tokens: int
    new_tokens: int
    text: list[str]
    cache: str | None
    written: list[Writing]

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema "quantkit-long/1" (docs/evaluation.md)."""
        return {"schema": SCHEMA} | asdict(self)


def writing(way: str, sampling: Sampling, texts: list[Text]) -> Writing:
    """What the report says of texts that were written one way."""
    kl = torch.stack([text.kl for text in texts])  # [texts, new tokens]
    agreed = torch.stack([text.agreed for text in texts])
    parted = [_difference(text.tokens, text.base) for text in texts]
    mean, error = _mean(kl)
    ours, theirs = ([repetition(tokens) for tokens in each] for each in _both(texts))
    more = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    difference, difference_se = ratio(more, torch.ones_like(more))
    loops = [[loop(tokens) for tokens in each] for each in _both(texts)]
    return Writing(
        way=way,
        temperature=sampling.temperature,
        seed=sampling.seed if sampling.temperature else None,
        kl_mean=mean,
        kl_mean_se=error,
        kl_max=float(kl.max()),
        top1_agreement=float(agreed.mean()),
        first_difference=parted,
        repetition=ours,
        repetition_baseline=theirs,
        repetition_difference=difference,
        repetition_difference_se=difference_se,
        loops=loops[0],
        loops_baseline=loops[1],
        curve=list(_curve(kl, agreed, parted)),
    )


def _both(texts: list[Text]) -> tuple[list[list[int]], list[list[int]]]:
    return [text.tokens for text in texts], [text.base for text in texts]


def _mean(kl: torch.Tensor) -> tuple[float, float | None]:
    """Mean of [texts, tokens] and its standard error over texts."""
    return ratio(kl.sum(1), torch.full((len(kl),), float(kl.shape[1]), dtype=torch.float64))


def _curve(kl: torch.Tensor, agreed: torch.Tensor, parted: list[int | None]) -> Iterator[Bucket]:
    """Buckets of equal length over the new tokens, BUCKETS of them where there are as many tokens."""
    size = -(-kl.shape[1] // BUCKETS)
    for start in range(0, kl.shape[1], size):
        part = kl[:, start : start + size]
        last = start + part.shape[1]
        mean, error = _mean(part)
        share = sum(at is not None and at <= last for at in parted) / len(parted)
        yield Bucket(start + 1, last, mean, error, float(agreed[:, start:last].mean()), share)


def repetition(tokens: list[int]) -> float:
    """Share of the GRAM-grams of a text that are no new ones: 0 if all differ, near 1 for a loop."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loop(tokens: list[int]) -> int | None:
    """Where the loop begins that a text ends in, from 1; None if it ends in none.

    The end of the text is a loop of period p if its tokens equal those p before them, for ROUNDS periods in all and at
    least 12 tokens; of several periods the shortest counts.
    """
    for period in range(1, len(tokens) // ROUNDS + 1):
        start = len(tokens) - period
        while start and tokens[start - 1] == tokens[start - 1 + period]:
            start -= 1
        if len(tokens) - start >= max(ROUNDS * period, _LEAST_LOOP):
            return start + 1
    return None


def _difference(ours: list[int], theirs: list[int]) -> int | None:
    """The first place, from 1, where two texts differ."""
    return next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=True), 1) if a != b), None)
