"""Logits -> the next token: greedy, or drawn after temperature, top-k and top-p."""

from __future__ import annotations

import torch

from quantkit_eval.errors import BrokenModel


def pick(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """One token from logits [vocabulary] on any device; `generator` is of the CPU, so seeds mean the same.

    temperature 0 is greedy; top_k 0 and top_p 1 leave every token in.
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
    mass = torch.where(kept, p, 0.0).cumsum(-1)
    drawn = torch.rand((), generator=generator).to(mass.device) * mass[-1]
    at = int((mass <= drawn).sum())
    return int(order[min(at, int(kept.sum()) - 1)])  # a draw rounded up to the whole mass is the last kept
