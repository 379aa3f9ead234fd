"""How far quantized models are from the original, from hidden states behind the last block: KL of the logits.

The head of a large vocabulary is bigger than a block's inputs, so a few tokens at a time become logits, of the original
once and then of every other model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from quantkit.calibration.forward import finish
from quantkit.calibration.returned import Form
from quantkit.calibration.streams import Rows
from quantkit.models import skeleton
from quantkit.models.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 1 << 22  # elements of one tensor of logits


def token_kl(p: torch.Tensor, logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL of each token [n], in nats; `other` is overwritten.

    p: softmax of the original's `logits` [n, vocabulary]. With d = logits - other and m its mean under p,
    KL = log sum p exp(m - d): no logarithms of the size of log p, whose rounding would be of the size of a small KL,
    and one exponential for each model.
    """
    d = other.neg_().add_(logits)
    mean = torch.linalg.vecdot(p, d)
    d.neg_().add_(mean[:, None])
    kl: torch.Tensor = torch.linalg.vecdot(p, d.expm1_()).log1p_()
    return kl


@torch.no_grad()
def window_kl(
    model: PreTrainedModel,
    source: Source,
    blocks_prefix: str,
    ids: torch.Tensor,
    original: Rows,
    others: Sequence[Rows],
    form: Form,
    device: torch.device,
) -> torch.Tensor:
    """Mean KL(original || other) over the tokens of each window, in nats: fp64 [others, windows].

    ids: [windows, length]. original, others: hidden states behind the last block [windows, length, hidden].
    form: how the blocks return theirs.
    """
    prefix, blocks = skeleton.find_blocks(model, blocks_prefix)
    skeleton.load_outside(model, source, prefix, device=device)
    windows, length = ids.shape
    total = torch.zeros(len(others), windows, dtype=torch.float64)
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    step = max(1, min(length, LOGITS // vocabulary)) if original.dim() == 3 else length

    def logits(hidden: Rows, window: int, tokens: slice) -> torch.Tensor:
        states = hidden[window : window + 1, tokens].to(device)
        given = ids[window : window + 1, tokens].to(device)
        return finish(model, blocks, states, given, form)[0].float()  # (tokens, vocabulary)

    for window in range(windows):
        for start in range(0, length, step):
            tokens = slice(start, start + step)
            base = logits(original, window, tokens)
            p = base.softmax(-1)
            for number, hidden in enumerate(others):
                kl = token_kl(p, base, logits(hidden, window, tokens))
                total[number, window] += float(kl.double().sum())
    skeleton.free_outside(model, prefix)
    return total / length
