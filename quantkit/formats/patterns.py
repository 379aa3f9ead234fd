"""Regular expressions of a file that is not ours, matched in bounded time.

Python's `re` tries alternatives one after the other, and a pattern such as `(.*)*x$` keeps it busy for years.
Here a pattern is parsed by Python and evaluated on sets of positions: every part of it maps "where it may start" to
"where it may end", and each (part, start) is worked out once. Time grows with the length of the pattern times the
square of the length of the name.

Read are literals, sets, groups, alternatives, repeats, anchors and lookaheads. Backreferences, lookbehinds,
possessive parts and flags, which no config of a checkpoint needs, are refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_PATTERN = 2000  # characters
MAX_NAME = 1000
MAX_PARTS = 100_000  # (part, start) pairs of one match


class PatternError(ValueError):
    """The pattern does not compile, or has a construct that is not read."""


@lru_cache(maxsize=4096)
def parsed(pattern: str) -> Any:
    """The parts of a pattern. PatternError if it cannot be used."""
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"it has {len(pattern)} characters, more than {MAX_PATTERN}")
    try:
        tree = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(str(error) or "it is nested too deeply") from None
    if tree.state.flags & ~re.UNICODE.value:
        raise PatternError("flags such as (?i) are not read")
    return tree


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` fits `name` from its beginning, like `re.match`. PatternError if the pattern cannot be used."""
    if len(name) > MAX_NAME:
        return False
    return bool(_Match(name).sequence(parsed(pattern), {0}))


class _Match:
    """One name; remembers what each part of a pattern does at each position of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[tuple[int, int], set[int]] = {}

    def sequence(self, parts: Any, starts: set[int]) -> set[int]:
        """Where a match of all parts in order ends, begun at any of `starts`."""
        for kind, value in parts:
            starts = self.part(kind, value, starts)
            if not starts:
                break
        return starts

    def part(self, kind: Any, value: Any, starts: set[int]) -> set[int]:
        ends: set[int] = set()
        for start in starts:
            key = (id(value), start) if isinstance(value, tuple | list) else None
            found = self.known.get(key) if key else None
            if found is None:
                found = self.at(kind, value, start)
                if key:
                    self.known[key] = found
                    if len(self.known) > MAX_PARTS:
                        raise PatternError("it takes too long to match")
            ends |= found
        return ends

    def at(self, kind: Any, value: Any, start: int) -> set[int]:
        """Where one part may end that begins at `start`."""
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            fits = start < len(self.name) and _fits(kind, value, self.name[start])
            return {start + 1} if fits else set()
        if kind is op.BRANCH:
            return set().union(*(self.sequence(parts, {start}) for parts in value[1]))
        if kind is op.SUBPATTERN and not value[1] and not value[2]:
            return self.sequence(value[3], {start})
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, parts = value
            return self.repeat(least, most, parts, start)
        if kind in (op.ASSERT, op.ASSERT_NOT) and value[0] > 0:
            found = bool(self.sequence(value[1], {start}))
            return {start} if found == (kind is op.ASSERT) else set()
        if kind is op.AT:
            return {start} if _anchored(value, self.name, start) else set()
        raise PatternError(f"{str(kind).lower()} is not read")

    def repeat(self, least: int, most: int, parts: Any, start: int) -> set[int]:
        """Every end after `least` to `most` times `parts`. After len(name) + 1 times nothing new can happen."""
        size, here = len(self.name), {start}
        for _ in range(min(int(least), size + 1)):
            here = self.sequence(parts, here)
        ends, left = set(here), int(most) - int(least)
        while here and left > 0:
            here = self.sequence(parts, here) - ends
            ends |= here
            left -= 1
        return ends


def _anchored(anchor: Any, name: str, at: int) -> bool:
    if anchor in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
        return at == 0
    if anchor in (op.AT_END, op.AT_END_STRING):
        return at == len(name)
    before, after = at > 0 and _word(name[at - 1]), at < len(name) and _word(name[at])
    return (before != after) == (anchor is op.AT_BOUNDARY)


def _word(character: str) -> bool:
    return character.isalnum() or character == "_"


_CATEGORIES = {
    op.CATEGORY_DIGIT: (str.isdecimal, True),
    op.CATEGORY_NOT_DIGIT: (str.isdecimal, False),
    op.CATEGORY_SPACE: (str.isspace, True),
    op.CATEGORY_NOT_SPACE: (str.isspace, False),
    op.CATEGORY_WORD: (_word, True),
    op.CATEGORY_NOT_WORD: (_word, False),
}


def _fits(kind: Any, value: Any, character: str) -> bool:
    """Whether one character is what a literal, a dot, a range, a category or a set of these asks for."""
    if kind is op.LITERAL:
        return bool(ord(character) == value)
    if kind is op.NOT_LITERAL:
        return bool(ord(character) != value)
    if kind is op.ANY:
        return character != "\n"
    if kind is op.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    if kind is op.CATEGORY:
        test, wanted = _CATEGORIES[value]
        return test(character) == wanted
    negated = value[0][0] is op.NEGATE
    return any(_fits(part, what, character) for part, what in value[negated:]) != negated
