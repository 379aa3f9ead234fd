"""Text -> windows of tokens, and which tokens of each are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from quantkit_eval.errors import EvalError
from quantkit_eval.model import longest_context
from quantkit_eval.protocols import CausalLM, Tokenizer
from quantkit_eval.text import Text

DEFAULT_CONTEXT = 2048
WHOLE = 1 << 20  # characters: a text that is not longer is tokenized whole
CHARACTERS = 8  # read per token wanted, to begin with
CHECKED = 1 << 14  # characters, how far what follows is tried out
_CHUNK_LOGITS = 1 << 23  # elements turned into fp32 log-probabilities at a time, per model


@dataclass(frozen=True)
class Window:
    """ids: int64 [context]. The last `scored` of them are predicted, the others are context only."""

    ids: torch.Tensor
    scored: int


def tokenize(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """Token ids of the whole text in one call (pieces would change tokens at their ends).

    special: whether the tokenizer adds the tokens it puts around a text. EvalError for a text with half of a surrogate
    pair, as Python reads what is not UTF-8 on the command line: no tokenizer takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise EvalError(
            f"the text is not valid UTF-8: character {error.start + 1} is {half}; give it in UTF-8"
        ) from None
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def first_tokens(tokenizer: Tokenizer, text: Text, most: int | None) -> list[int]:
    """The first `most` token ids of a text (None: all), as `tokenize` gives them for the whole of it.

    Of a long text only a beginning is read: until the tokens wanted are the same whether it ends after them or
    CHECKED characters later. Both ends are behind a line break (else a space), where tokenizers cut anyway. Only in a
    text without spaces could what follows even later still change them.
    """
    if most is None:
        return tokenize(tokenizer, text.whole())
    size = max(WHOLE, CHARACTERS * most)
    while True:
        beginning, everything = text.start(size)
        if everything:
            return tokenize(tokenizer, beginning)[:most]
        end = _cut(beginning, len(beginning))
        longer = tokenize(tokenizer, beginning[:end])[:most]
        shorter = tokenize(tokenizer, beginning[: _cut(beginning, end - CHECKED)])[:most]
        if len(shorter) == most and shorter == longer:
            return longer
        size *= 2


def _cut(text: str, before: int) -> int:
    """Where to end the text at or before a position: behind a line break, else behind a space, else right there."""
    before = max(0, before)
    for mark in "\n ":
        found = text.rfind(mark, max(0, before - CHECKED), before)
        if found >= 0:
            return found + 1
    return before


def first_token(tokenizer: Tokenizer) -> int | None:
    """The id the tokenizer puts in front by itself (BOS), or None."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and ids[:1] == [bos] else None


def context_of(models: Sequence[CausalLM], wanted: int | None) -> int:
    """The window length: `wanted`, or min(2048, what the models were made for)."""
    known = [most for most in map(longest_context, models) if most]
    if wanted is None:
        return min([DEFAULT_CONTEXT, *known])
    if wanted < 2:
        raise EvalError(f"context must be at least 2 tokens, got {wanted}")
    if known and wanted > min(known):
        raise EvalError(f"context {wanted} is beyond the model's {min(known)} tokens; use at most those")
    return wanted


def cut(
    ids: list[int],
    context: int,
    stride: int | None = None,
    bos: int | None = None,
    max_tokens: int | None = None,
) -> list[Window]:
    """Windows of `context` tokens (BOS included where there is one), `stride` apart.

    stride = context (default): windows do not overlap; without a BOS the first token of each has nothing before
    it and is not scored. A smaller stride: every window but the first scores its last `stride` tokens, so that
    each token of the text, without a BOS all but the first, is scored once. A rest too short for a window is
    left out. max_tokens: only so many tokens of the text are used.
    """
    if stride is not None and not 1 <= stride <= context:
        raise EvalError(f"stride must be 1 to the context {context}, got {stride}")
    room = context - (bos is not None)
    step = room if stride is None else min(stride, room)
    if max_tokens is not None and max_tokens < room:
        raise EvalError(
            f"max_tokens {max_tokens} is less than one window of {room}; raise it or lower context"
        )
    if len(ids) < room:
        raise EvalError(
            f"the text has {len(ids)} tokens, one window needs {room}; give more text or a smaller context"
        )
    front = [] if bos is None else [bos]
    windows: list[Window] = []
    for start in range(0, len(ids[:max_tokens]) - room + 1, step):
        fresh = step if windows else room
        window = torch.tensor(front + ids[start : start + room])
        windows.append(Window(window, min(fresh, len(window) - 1)))
    return windows


def chunks(window: Window, vocabulary: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows of the logits, the tokens they predict), of few logits at a time: position i predicts token i + 1."""
    step = max(1, _CHUNK_LOGITS // vocabulary)
    last = len(window.ids) - 1
    for start in range(last - window.scored, last, step):
        end = min(start + step, last)
        yield slice(start, end), window.ids[start + 1 : end + 1]
