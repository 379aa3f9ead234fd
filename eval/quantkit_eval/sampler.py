"""Logits -> the next token: greedy, or drawn after temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantkit_eval.errors import BrokenModel, EvalError

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. EvalError for options out of range.

    temperature 0 is greedy; top_k 0 and top_p 1 leave every token in. seed: of a random generator of its own, None
    for another one each time; the global random state is not touched.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        for name, value, right, wanted in (
            ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k, isinstance(self.top_k, int) and self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed, _is_seed(self.seed), "an integer from -2**63 to 2**64 - 1, or None"),
        ):
            if not right:
                raise EvalError(f"{name} must be {wanted}, got {value}")

    def chooser(self) -> Callable[[torch.Tensor], int]:
        """logits [vocabulary] -> a token; two choosers of one seed draw the same."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return lambda logits: pick(logits, self.temperature, self.top_k, self.top_p, generator)


def seeds(first: int | None, count: int) -> list[int | None]:
    """Of several sequences: first, first + 1, ...; behind the largest one they start at 0 again. None stays None."""
    if not isinstance(first, int):
        return [first] * count
    return [first + i if i == 0 or first + i < 2**64 else first + i - 2**64 for i in range(count)]


def _is_seed(seed: int | None) -> bool:
    """Whether a generator of torch takes it."""
    return seed is None or (isinstance(seed, int) and -(2**63) <= seed < 2**64)


def pick(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token from logits [vocabulary] on any device; `generator` is on the CPU, so that seeds mean the same.

    temperature 0 is greedy; top_k 0 and top_p 1 leave every token in. Every token of the vocabulary gets a random
    number of its own and the first in the race, the largest log p - log(exponential), is drawn (Gumbel, 1954): with one
    seed, two models that differ little then draw different tokens as rarely as their probabilities differ.
    """
    best = logits.float().max()
    if not bool(torch.isfinite(best)):
        raise BrokenModel(
            "the model gives non-finite logits; it is broken, or its dtype too narrow (try float32)"
        )
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.float() - best) / temperature  # the best at 0, so that no temperature overflows
    values, order = scaled.sort(descending=True, stable=True)
    p = values[: top_k or None].softmax(-1)
    kept = p.cumsum(-1) - p < top_p  # what lies before a token is below top_p; the first always stays
    noise = torch.empty(len(logits)).exponential_(generator=generator).clamp_(min=_TINY).log_()
    race = values[: len(p)] - noise.to(values.device)[order[: len(p)]]
    return int(order[race.masked_fill(~kept, -torch.inf).argmax()])
