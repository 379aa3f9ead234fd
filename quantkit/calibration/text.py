"""Calibration windows: the text of a recipe's sources cut into seeded, disjoint pieces, the same on every machine.

Each source becomes one token stream (`documents.py` reads its text). Its windows are disjoint pieces at random places,
so that a book gives more than its first chapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from quantkit.calibration.documents import DataSource, Document, read_source
from quantkit.errors import DataError
from quantkit.models.borders import foreign_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 32768  # characters per call of the tokenizer
CHARACTERS_PER_TOKEN = 32  # how much text is read for each token wanted, so that a huge source stays bounded
LEAST_READ = 2_000_000
UNKNOWN_SHARE = 0.1


class Calibration(Protocol):
    """The `calibration` part of a recipe."""

    @property
    def data(self) -> Sequence[DataSource]: ...
    @property
    def samples(self) -> int: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Windows:
    """What a model is calibrated on.

    ids: int64 [samples, sequence_length]. digest: sha256 (hex) of the ids. notes: lines for the report. sources: per
    source its name, the windows taken from it and the sha256 of the text that was read.
    """

    ids: torch.Tensor
    digest: str
    notes: list[str]
    sources: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Embedded:
    source: str
    config: None = None
    split: None = None
    field: None = None
    samples: None = None


@dataclass(frozen=True)
class Read:
    """One source as windows are cut from it. tokens: int64 [n], of all its text. windows: how many it gave."""

    document: Document
    tokens: torch.Tensor
    windows: int


def token_windows(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    default_source: Path,
    vocabulary: int | None = None,
) -> Windows:
    """The windows a recipe asks for, see `read_windows`."""
    return read_windows(calibration, tokenizer, default_source, vocabulary)[0]


def read_windows(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    default_source: Path,
    vocabulary: int | None = None,
) -> tuple[Windows, list[Read]]:
    """(the windows a recipe asks for, the sources); `default_source` (a text file) stands in when it names no data.

    Windows begin with BOS where the tokenizer adds one by itself. vocabulary: rows of the model's embedding;
    ids beyond it are refused. DataError for anything wrong with a source.
    """
    sources = calibration.data or (_Embedded(str(default_source)),)
    counts = _counts(sources, calibration.samples)
    generator = torch.Generator().manual_seed(calibration.seed)
    bos = leading_token(tokenizer)
    length = calibration.sequence_length
    parts, notes, sums, read = [], [], [], []
    for source, count in zip(sources, counts, strict=True):
        limit = max(LEAST_READ, CHARACTERS_PER_TOKEN * count * length)
        document = read_source(source, limit, tokenizer)
        with foreign_errors(f"{source.source}: the tokenizer fails on this text", error=DataError):
            tokens = _tokens(document.text, tokenizer)
        parts.append(_cut(tokens, count, length, bos, generator, source.source))
        notes += _notes(document, tokens, count, length, tokenizer)
        sums.append({"name": document.name, "samples": count, "sha256": document.digest})
        read.append(Read(document, tokens, count))
    ids = torch.cat(parts)
    ids = ids[torch.randperm(len(ids), generator=generator)]  # the first windows are a sample of all of them
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {int(ids.max())}, the model has {vocabulary}; they do not match"
        )
    return Windows(ids, hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(), notes, sums), read


def _counts(sources: Iterable[DataSource], samples: int) -> list[int]:
    """Windows per source: what was asked for, the rest shared evenly, earlier sources first."""
    given = [source.samples for source in sources]
    free = given.count(None)
    rest = samples - sum(count for count in given if count is not None)
    shares = iter([rest // free + (i < rest % free) for i in range(free)] if free else [])
    return [next(shares) if count is None else count for count in given]


def leading_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token if the tokenizer puts it before every text."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [n] of a text, cut at line ends into pieces that a tokenizer handles well."""
    pieces, start = [], 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            end = max(text.rfind("\n", start, end), text.rfind(" ", start, end), start) + 1
            end = start + PIECE if end == start + 1 else end
        pieces.append(text[start:end])
        start = end
    if not pieces:
        return torch.empty(0, dtype=torch.int64)
    found = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return torch.tensor([token for piece in found for token in piece], dtype=torch.int64)


def _cut(
    tokens: torch.Tensor, count: int, length: int, bos: int | None, generator: torch.Generator, name: str
) -> torch.Tensor:
    """`count` disjoint windows [count, length] at random places of the stream."""
    body = length - (bos is not None)
    if len(tokens) < count * body:
        raise DataError(
            f"{name}: {count} windows of {length} tokens need {count * body} tokens of text, there are "
            f"{len(tokens)}; give more text, or lower calibration.samples (to {len(tokens) // body} at "
            "most) or sequence_length"
        )
    slack = len(tokens) - count * body
    gaps = torch.randint(slack + 1, (count,), generator=generator).sort().values
    starts = gaps + body * torch.arange(count)
    windows = tokens[starts[:, None] + torch.arange(body)]  # (count, body)
    if bos is None:
        return windows
    return torch.cat([torch.full((count, 1), bos), windows], dim=1)


def _notes(
    document: Document, tokens: torch.Tensor, count: int, length: int, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """One line on what the windows were cut from, and one for each thing that looks wrong."""
    name = document.name
    share = f" of its first {len(document.text):,} characters" if document.cut else ""
    notes = [f"{name}: {count} windows of {length} tokens, without overlap, from {len(tokens)} tokens{share}"]
    if document.empty:
        notes.append(f"{name}: {document.empty} of {document.records} documents are empty and left out")
    unknown = tokenizer.unk_token_id
    if unknown is not None:
        missing = float((tokens == unknown).double().mean())
        if missing > UNKNOWN_SHARE:
            notes.append(
                f"{name}: {missing:.0%} of its tokens are unknown to the tokenizer; is it the right language?"
            )
    return notes
