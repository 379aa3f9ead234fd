"""Text that comes twice: documents that are equal, or nearly, lines that are repeated, and text shared with another.

Documents are compared by shingles, hashes of SHINGLE words in a row, case and white space apart; of many, by a share.
Token sequences are compared by every run of RUN tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

SHINGLE = 8  # words
NEAR = 0.5  # share of a document's shingles that an earlier one has too
SHORT = 40  # characters: shorter lines may well be repeated
RUN = 16  # tokens; a run that long hardly comes twice by chance
_KEPT = 4  # one shingle in so many is kept of a long document
_MANY = 64  # shingles, of a document that keeps all


@dataclass(frozen=True)
class Duplicates:
    """exact, near: how many documents are equal to an earlier one, or share at least half of their shingles with one.

    repeated_lines: share of the characters that are in lines of at least SHORT characters which came before.
    """

    exact: int
    near: int
    repeated_lines: float


def duplicates(documents: Sequence[str]) -> Duplicates:
    """What comes twice in some documents."""
    seen: set[bytes] = set()
    first: dict[int, int] = {}  # shingle -> the first document that has it
    exact = near = 0
    for number, document in enumerate(documents):
        words = re.findall(r"\w+", document.casefold())
        digest = _digest(" ".join(words) if words else document)
        if digest in seen:
            exact += 1
            continue
        seen.add(digest)
        own = _shingles(words)
        shared = Counter(first[each] for each in own if each in first)
        near += bool(own) and max(shared.values(), default=0) >= NEAR * len(own)
        for each in own:
            first.setdefault(each, number)
    return Duplicates(exact, near, _repeated(documents))


def _shingles(words: list[str]) -> set[int]:
    """Hashes of what stands in a text, SHINGLE words at a time."""
    runs = (" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1))
    found = {int.from_bytes(_digest(run)) for run in runs}
    return found if len(found) <= _MANY else {each for each in found if not each % _KEPT}


def _repeated(documents: Iterable[str]) -> float:
    seen: set[bytes] = set()
    total = repeated = 0
    for document in documents:
        for line in document.splitlines():
            total += len(line)
            text = " ".join(line.split())
            if len(text) < SHORT:
                continue
            digest = _digest(text)
            repeated += len(line) * (digest in seen)
            seen.add(digest)
    return repeated / total if total else 0.0


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()


@dataclass(frozen=True)
class Overlap:
    """Text that calibration shares with an evaluation.

    windows: calibration windows with a run of RUN tokens that the evaluation has too. share: of the evaluation's runs,
    those that some window has.
    """

    windows: int
    share: float


def overlap(windows: torch.Tensor, evaluation: torch.Tensor) -> Overlap:
    """What windows [windows, length] share with the tokens [n] of an evaluation."""
    if windows.shape[1] < RUN or len(evaluation) < RUN:
        return Overlap(0, 0.0)
    ours, theirs = _runs(windows), _runs(evaluation)
    common = torch.isin(ours, theirs)
    return Overlap(int(common.any(1).sum()), float(torch.isin(theirs, ours).double().mean()))


def _runs(tokens: torch.Tensor) -> torch.Tensor:
    """A hash of every run of RUN tokens in the last axis of int64 [..., n]: [..., n - RUN + 1]."""
    total = torch.zeros_like(tokens[..., RUN - 1 :])
    last = tokens.shape[-1] - RUN + 1
    for offset in range(RUN):
        total = total * 6364136223846793005 + tokens[..., offset : offset + last] + 1442695040888963407
        total = total ^ (total >> 29)
    return total
