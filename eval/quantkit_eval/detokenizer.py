"""Text from tokens while they are being generated, in pieces of whole characters.

A byte-level token may hold part of a character, and a decoder may treat the first token of a text differently
(SentencePiece strips its space). So each piece is the difference between two decodings that begin with the same few
tokens.
"""

from __future__ import annotations

from quantkit_eval.protocols import Tokenizer

_BROKEN = "\ufffd"
_FRONT = 5  # tokens of the prompt that are decoded in front of the first piece


class Detokenizer:
    """The text after a prompt, token by token."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_FRONT:])
        self._start = 0  # the token that decoding starts at
        self._told = len(self._ids)  # the text of the tokens before this one has been returned

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        self._ids.append(token)
        return self._piece(last=False)

    def finish(self) -> str:
        """The rest of the text, with U+FFFD for bytes that never became a character."""
        return self._piece(last=True)

    def _piece(self, last: bool) -> str:
        before = self._decode(self._ids[self._start : self._told])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith(_BROKEN) and not last):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
