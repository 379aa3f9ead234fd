"""Tokens -> text as they come, in pieces of whole characters.

A byte-level token may hold part of a character, and a decoder may treat the first token of a text differently
(SentencePiece strips its space), so each piece is the difference of two decodings that share a few tokens in
front.
"""

from __future__ import annotations

from typing import Any

_BROKEN = "\ufffd"
_FRONT = 5  # tokens of the prompt that the first piece is decoded behind


class Detokenizer:
    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_FRONT:])
        self._start = 0  # decoding starts here
        self._told = len(self._ids)  # tokens up to here are told

    def push(self, token: int) -> str:
        """The text that is now certain, "" while a character is unfinished."""
        self._ids.append(token)
        return self._piece(last=False)

    def finish(self) -> str:
        """The rest; bytes that never became a character as U+FFFD."""
        return self._piece(last=True)

    def _piece(self, last: bool) -> str:
        before = self._decode(self._ids[self._start : self._told])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith(_BROKEN) and not last):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
