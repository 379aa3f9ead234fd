"""Calibration text -> token windows: seeded, disjoint, the same on every machine.

Each source becomes one long text (documents joined by a blank line, chats rendered by the tokenizer's
template), then one token stream. Its windows are disjoint pieces at random places: a book gives more than its
first chapter.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from quantkit_eval.dataset import is_saved, reader

from quantkit.errors import DataError

PIECE = 32768  # characters per call of the tokenizer
CHARACTERS_PER_TOKEN = 32  # how much text is read for each token wanted, so that a huge source stays bounded
LEAST_READ = 2_000_000
MAX_LINE = 50_000_000
UNKNOWN_SHARE = 0.1
FIELDS = ("text", "messages", "conversations")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILE_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet", ".csv", ".gz")


class DataSource(Protocol):
    """A source as a recipe describes it; None leaves the choice to this module."""

    source: str
    config: str | None
    split: str | None
    field: str | None
    samples: int | None


class Calibration(Protocol):
    """The `calibration` part of a recipe."""

    data: tuple[DataSource, ...]
    samples: int
    sequence_length: int
    seed: int


@dataclass(frozen=True)
class Windows:
    """ids: int64 [samples, sequence_length]. digest: sha256 (hex) of the ids. notes: lines for the report."""

    ids: torch.Tensor
    digest: str
    notes: list[str]


@dataclass(frozen=True)
class _Embedded:
    source: str
    config: None = None
    split: None = None
    field: None = None
    samples: None = None


@dataclass
class _Reading:
    """One source while it is read; counts what is left out."""

    source: DataSource
    limit: int
    empty: int = 0
    documents: int = 0
    cut: bool = False


def token_windows(
    calibration: Calibration, tokenizer: Any, default_source: Path, vocabulary: int | None = None
) -> Windows:
    """The windows a recipe asks for; `default_source` (a text file) stands in when it names no data.

    Windows begin with BOS where the tokenizer adds one by itself. vocabulary: rows of the model's embedding;
    ids beyond it are refused. DataError for anything wrong with a source.
    """
    sources = calibration.data or (_Embedded(str(default_source)),)
    counts = _counts(sources, calibration.samples)
    generator = torch.Generator().manual_seed(calibration.seed)
    bos = _bos(tokenizer)
    parts, notes = [], []
    for source, count in zip(sources, counts, strict=True):
        reading = _Reading(
            source, max(LEAST_READ, CHARACTERS_PER_TOKEN * count * calibration.sequence_length)
        )
        tokens = _tokens(_text(reading, tokenizer), tokenizer)
        parts.append(_cut(tokens, count, calibration.sequence_length, bos, generator, source.source))
        notes += _notes(reading, tokens, count, calibration.sequence_length, tokenizer)
    ids = torch.cat(parts)
    ids = ids[torch.randperm(len(ids), generator=generator)]  # the first windows are a sample of all of them
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {int(ids.max())}, the model has {vocabulary}; they do not match"
        )
    return Windows(ids, hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(), notes)


def _counts(sources: Iterable[DataSource], samples: int) -> list[int]:
    """Windows per source: what was asked for, the rest shared evenly, earlier sources first."""
    given = [source.samples for source in sources]
    free = given.count(None)
    rest = samples - sum(count for count in given if count is not None)
    shares = iter([rest // free + (i < rest % free) for i in range(free)] if free else [])
    return [next(shares) if count is None else count for count in given]


def _bos(tokenizer: Any) -> int | None:
    """The BOS token if the tokenizer puts it before every text."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _tokens(text: str, tokenizer: Any) -> torch.Tensor:
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


def _notes(reading: _Reading, tokens: torch.Tensor, count: int, length: int, tokenizer: Any) -> list[str]:
    name = Path(reading.source.source).name
    notes = [f"{name}: {count} windows of {length} tokens, without overlap, from {len(tokens)} tokens"]
    if reading.cut:
        notes.append(f"{name}: only its first {reading.limit} characters were read, enough for these windows")
    if reading.empty:
        notes.append(f"{name}: {reading.empty} of {reading.documents} documents are empty and left out")
    unknown = tokenizer.unk_token_id
    if unknown is not None:
        share = float((tokens == unknown).double().mean())
        if share > UNKNOWN_SHARE:
            notes.append(
                f"{name}: {share:.0%} of its tokens are unknown to the tokenizer; is it the right language?"
            )
    return notes


def _text(reading: _Reading, tokenizer: Any) -> str:
    """The text of one source, at most `reading.limit` characters."""
    name = reading.source.source
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix in (".jsonl", ".json"):
            text = _joined(_json_lines(path), reading, tokenizer)
        else:
            text = _file_text(path, reading)
    elif path.is_dir() or (_HUB_ID.fullmatch(name) and path.suffix not in _FILE_SUFFIXES):
        text = _joined(_dataset(reading.source, path), reading, tokenizer)
    else:
        raise DataError(f"calibration data {name!r} is no file, no folder and no dataset id; check the path")
    if not text.strip():
        raise DataError(f"calibration data {name} is empty")
    return text


def _file_text(path: Path, reading: _Reading) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(reading.limit)
            reading.cut = bool(file.read(1))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if "\0" in text:
        raise DataError(f"calibration data {path} is not text (it holds NUL bytes)")
    return text


def _not_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    return DataError(f"calibration data {path} is not UTF-8 text ({error.reason}); convert it to UTF-8")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"calibration data {path} cannot be read: {error.strerror or error}")


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, record) for each line."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
                where = f"{path}:{number}"
                if len(line) > MAX_LINE:
                    raise DataError(
                        f"{where}: more than {MAX_LINE} characters in one line; is it JSON Lines?"
                    )
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"{where}: not valid JSON ({error}); one object per line is expected"
                    ) from None
                if not isinstance(record, dict):
                    raise DataError(f"{where}: a {type(record).__name__}, one object per line is expected")
                yield where, record
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _dataset(source: DataSource, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, record) of a dataset folder or hub dataset, streamed, not fetched or cached whole."""
    local = path.is_dir()
    split = source.split or "train"
    with reader(f"{source.source} (split {split})", DataError) as datasets:
        if local and is_saved(path):
            rows = datasets.load_from_disk(str(path))
            rows = rows[split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(
                str(path) if local else source.source, source.config, split=split, streaming=True
            )
        for number, record in enumerate(rows):
            yield f"{source.source}[{number}]", record


def _joined(records: Iterable[tuple[str, Mapping[str, Any]]], reading: _Reading, tokenizer: Any) -> str:
    parts, size = [], 0
    for where, record in records:
        text = _document(where, record, reading.source.field, tokenizer)
        reading.documents += 1
        if not text.strip():
            reading.empty += 1
            continue
        parts.append(text)
        size += len(text)
        if size >= reading.limit:
            reading.cut = True
            break
    return "".join(parts)[: reading.limit]


def _document(where: str, record: Mapping[str, Any], wanted: str | None, tokenizer: Any) -> str:
    present = [key for key in (FIELDS if wanted is None else (wanted,)) if key in record]
    if not present:
        raise DataError(
            f"{where}: no field {wanted or ' or '.join(FIELDS)}; it has {', '.join(map(str, record))}; "
            "name the one to use with `field`"
        )
    name = next((key for key in present if record[key] is not None), present[0])
    value = record[name]
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip("\n") + "\n\n" if value.strip() else ""
    if isinstance(value, list) and all(
        isinstance(m, Mapping) and "role" in m and "content" in m for m in value
    ):
        return _chat(where, value, tokenizer) if value else ""
    raise DataError(f"{where}: field {name} is neither a text nor a list of {{role, content}} messages")


def _chat(where: str, messages: list[Mapping[str, Any]], tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: chat messages need a chat template, the tokenizer has none; give plain text"
        )
    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False)
    except Exception as error:  # a template is a program of the model's maker
        raise DataError(f"{where}: the chat template refuses these messages: {error}") from error
