"""How far quantized models are from the original, from hidden states behind the last block: KL of the logits.

The head of a large vocabulary is bigger than a block's inputs, so a few tokens at a time become logits, of the original
once and then of every other model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from quantkit_eval.divergence import token_kl

from quantkit.calibration.forward import finish
from quantkit.models import skeleton
from quantkit.models.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 1 << 22  # elements of one tensor of logits


@torch.no_grad()
def window_kl(
    model: PreTrainedModel,
    source: Source,
    blocks_prefix: str,
    ids: torch.Tensor,
    original: torch.Tensor,
    others: Sequence[torch.Tensor],
    as_tuple: bool,
    device: torch.device,
) -> torch.Tensor:
    """Mean KL(original || other) over the tokens of each window, in nats: fp64 [others, windows].

    ids: [windows, length]. original, others: hidden states behind the last block [windows, length, hidden].
    as_tuple: whether the blocks return theirs in a tuple.
    """
    prefix, blocks = skeleton.find_blocks(model, blocks_prefix)
    skeleton.load_outside(model, source, prefix, device=device)
    windows, length = ids.shape
    total = torch.zeros(len(others), windows, dtype=torch.float64)
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    step = max(1, min(length, LOGITS // vocabulary))

    def log_p(hidden: torch.Tensor, window: int, tokens: slice) -> torch.Tensor:
        states = hidden[window : window + 1, tokens].to(device)
        given = ids[window : window + 1, tokens].to(device)
        return (
            finish(model, blocks, states, given, as_tuple)[0].float().log_softmax(-1)
        )  # (tokens, vocabulary)

    for window in range(windows):
        for start in range(0, length, step):
            tokens = slice(start, start + step)
            base = log_p(original, window, tokens)
            for number, hidden in enumerate(others):
                total[number, window] += float(token_kl(base, log_p(hidden, window, tokens)).double().sum())
    skeleton.free_outside(model, prefix)
    return total / length
