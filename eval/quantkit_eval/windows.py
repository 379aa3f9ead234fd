"""Text -> windows of tokens, and which tokens of each are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quantkit_eval.errors import EvalError

DEFAULT_CONTEXT = 2048
_PIECE = 65536  # characters per call of the tokenizer


@dataclass(frozen=True)
class Window:
    """ids [length]; the last `scored` of them are predicted, the others are context only."""

    ids: torch.Tensor
    scored: int


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the whole text, without special tokens, without a warning about its length."""
    ids: list[int] = []
    start = 0
    while start < len(text):
        end = min(start + _PIECE, len(text))
        cut = text.rfind("\n", start, end) + 1 if end < len(text) else end
        end = cut if cut > start else end
        ids += tokenizer(text[start:end], add_special_tokens=False, verbose=False).input_ids
        start = end
    return ids


def first_token(tokenizer: Any) -> int | None:
    """The id the tokenizer puts in front by itself (BOS), or None."""
    ids = tokenizer("a").input_ids
    bos = tokenizer.bos_token_id
    return bos if bos is not None and ids[:1] == [bos] else None


def context_of(model: Any, wanted: int | None) -> int:
    """The window length: `wanted`, or min(2048, what the model was made for)."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        return min(DEFAULT_CONTEXT, most) if most else DEFAULT_CONTEXT
    if wanted < 2 or (most and wanted > most):
        raise EvalError(f"context must be 2 to {most or 'any'} tokens for this model, got {wanted}")
    return wanted


def cut(
    ids: list[int],
    context: int,
    stride: int | None = None,
    bos: int | None = None,
    max_tokens: int | None = None,
) -> list[Window]:
    """Windows of `context` tokens (BOS included where there is one), `stride` apart.

    Each text token is scored at most once: a window scores what follows the end of the window before it. Without a
    BOS the first token of the text is never scored. stride = context (default): windows do not overlap, and the first
    token of each is not scored. A shorter rest at the end is dropped.
    """
    room = context - (bos is not None)
    stride = room if stride is None or stride >= context else stride
    if not 1 <= stride <= room:
        raise EvalError(f"stride must be 1 to {room}, got {stride}")
    ids = ids if max_tokens is None else ids[:max_tokens]
    if len(ids) < room:
        raise EvalError(
            f"the text has {len(ids)} tokens, one window needs {room}; give more text or a smaller context"
        )
    windows, done = [], 0
    for start in range(0, len(ids) - room + 1, stride):
        part = ids[start : start + room]
        fresh = start + room - max(done, start)
        whole = part if bos is None else [bos, *part]
        windows.append(Window(torch.tensor(whole), min(fresh, len(whole) - 1)))
        done = start + room
    return windows
