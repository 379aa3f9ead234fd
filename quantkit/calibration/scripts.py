"""Which part of a tokenizer's vocabulary a text touches, by the script that a token is written in."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS, DIGITS, SYMBOLS, SPACE = "parts of characters", "digits", "punctuation and symbols", "white space"
_OTHER = "other letters"


@dataclass(frozen=True)
class Script:
    """Tokens of a vocabulary that are written in one script. seen: those of them that the text has."""

    name: str
    tokens: int
    seen: int

    @property
    def written(self) -> bool:
        """Whether languages are written in it; digits, for one, are not a script."""
        return self.name not in (PARTS, DIGITS, SYMBOLS, SPACE, _OTHER)


def scripts(tokenizer: PreTrainedTokenizerBase, seen: Iterable[int]) -> list[Script]:
    """The vocabulary by script, largest first, special and added tokens left out. seen: token ids of the text."""
    beside = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    touched = set(seen)
    total: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for token, number in tokenizer.get_vocab().items():
        if number in beside:
            continue
        name = script_of(tokenizer.convert_tokens_to_string([token]))
        total[name] += 1
        found[name] += number in touched
    return [Script(name, count, found[name]) for name, count in total.most_common()]


def script_of(text: str) -> str:
    """The script of most letters of a text, such as "Latin" or "Cyrillic"; for a text without letters, what it is."""
    letters = Counter(_script(character) for character in text if character.isalpha())
    if letters:
        return letters.most_common(1)[0][0]
    if "\ufffd" in text:
        return PARTS
    kept = text.strip()
    if not kept:
        return SPACE
    return DIGITS if any(character.isnumeric() for character in kept) else SYMBOLS


@cache
def _script(letter: str) -> str:
    """The first word of a letter's name in Unicode, which is its script: "CYRILLIC SMALL LETTER A"."""
    word = unicodedata.name(letter, "").partition(" ")[0].partition("-")[0]
    if word in ("CJK", "KANGXI"):
        return "Chinese characters"
    if word in ("HIRAGANA", "KATAKANA"):
        return "Japanese syllables"
    known = word.isalpha() and word not in (
        "FULLWIDTH",
        "HALFWIDTH",
        "MODIFIER",
        "MATHEMATICAL",
        "SUPERSCRIPT",
    )
    return word.capitalize() if known else _OTHER
