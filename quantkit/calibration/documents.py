"""Where calibration text comes from: files, dataset folders and hub datasets -> one text per source, of bounded size.

The name of a file tells its kind: JSON Lines (`.jsonl`, `.ndjson`, `.json`; a `.json` may also be one list), tables
(`.csv`, `.tsv`), Parquet; all but Parquet also as `.gz`. A format that holds no text is refused by name, and anything
else is plain text. Records become documents joined by a blank line; chats are rendered by the tokenizer's template.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantkit_eval.dataset import is_saved, reader

from quantkit.errors import DataError
from quantkit.models.json_reader import parse_json
from quantkit.paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LINE = 50_000_000  # bytes of one line of JSON or of a table
MAX_LIST = 100_000_000  # bytes of a JSON file that is one list, which is read whole
_PIECE = 16_000_000  # bytes per read of a text file
FIELDS = ("text", "messages", "conversations")
ROLES = {  # of ShareGPT's {from, value} messages -> those of chat templates
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_REFUSED = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z"), "an archive; unpack it first"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".epub", ".odt"), "a document; save it as plain text first"),
    **dict.fromkeys((".arrow", ".feather"), "Arrow data; give the folder that `save_to_disk` wrote"),
    **dict.fromkeys((".xls", ".xlsx"), "a spreadsheet; save it as .csv first"),
    **dict.fromkeys((".safetensors", ".gguf", ".bin", ".pt", ".npy", ".npz"), "a file of numbers, not text"),
}

_File = gzip.GzipFile | BufferedReader
Record = tuple[str, Mapping[str, Any]]  # (where it was read, for errors; its fields)


class DataSource(Protocol):
    """A source as a recipe describes it; None leaves the choice to this module."""

    @property
    def source(self) -> str: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...
    @property
    def field(self) -> str | None: ...
    @property
    def samples(self) -> int | None: ...


@dataclass
class Document:
    """The text of one source.

    name: of its file or folder, without the folders above, or the dataset's id. cut: whether the source has more than
    was read. empty: records left out because they hold no text, of `records`. chats: records that the chat template has
    rendered. ends: where in the text each of its documents ends; one for a text file.
    """

    name: str
    text: str
    cut: bool = False
    empty: int = 0
    records: int = 0
    chats: int = 0
    ends: list[int] = field(default_factory=list)

    def documents(self) -> list[str]:
        """The text, document by document."""
        return [self.text[a:b] for a, b in pairwise([0, *(self.ends or [len(self.text)])])]

    @property
    def digest(self) -> str:
        """sha256 (hex) of the text that was read."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def check_source(source: DataSource) -> Path:
    """The path of a source that can be read as far as its name and the recipe tell; otherwise DataError."""
    path = user_path(source.source, DataError)
    suffix = _suffix(path)
    if path.is_file():
        if suffix in _REFUSED:
            raise DataError(f"calibration data {path} is {_REFUSED[suffix]}")
        if suffix in _RECORDS:
            _refuse(source, f"a {suffix} file", "config", "split")
        else:
            _refuse(source, "a text file", "config", "split", "field")
    elif path.is_dir():
        if is_saved(path):
            _refuse(source, "a saved dataset", "config")
    elif not _HUB_ID.fullmatch(source.source) or suffix in _KNOWN or path.suffix == ".gz":
        raise DataError(
            f"calibration data {source.source!r} is no file, no folder and no dataset id; check the path"
        )
    return path


def read_source(source: DataSource, limit: int, tokenizer: PreTrainedTokenizerBase) -> Document:
    """The text of one source, at most `limit` characters; DataError for anything wrong with it."""
    path = check_source(source)
    if path.is_file():
        suffix = _suffix(path)
        if suffix not in _RECORDS:
            document = _plain(path, limit)
        else:
            document = _joined(_RECORDS[suffix](path), source, limit, tokenizer)
    else:
        records = _folder(source, path) if path.is_dir() else _hub(source)
        document = _joined(records, source, limit, tokenizer)
    if not document.text.strip():
        raise DataError(f"calibration data {source.source} is empty")
    if path.exists():
        document.name = path.resolve().name
    return document


def _suffix(path: Path) -> str:
    """What tells the kind of a file: its last suffix, or the one before `.gz`, in small letters."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _refuse(source: DataSource, kind: str, *keys: str) -> None:
    """DataError if the recipe gives one of `keys` for a source that has no such thing."""
    given = [key for key in keys if getattr(source, key) is not None]
    if given:
        raise DataError(
            f"calibration data {source.source} is {kind}, which has no {' and no '.join(given)}; remove "
            f"{' and '.join(given)} from the recipe"
        )


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    """The bytes of a file, unpacked if it is `.gz`; DataError for what goes wrong while it is read."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(
            f"calibration data {path} is not UTF-8 text ({error.reason}); convert it to UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"calibration data {path} cannot be read: {said}") from None


def _plain(path: Path, limit: int) -> Document:
    most = 4 * limit + 7  # bytes: a character takes at most four, a byte order mark three
    pieces, size = [], 0
    with _opened(path) as file:
        while size < most and (
            piece := file.read(min(_PIECE, most - size))
        ):  # a read allocates all it asks for
            pieces.append(piece)
            size += len(piece)
    raw = b"".join(pieces)
    whole = len(raw) < most
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if whole or error.start < len(raw) - 3:
            raise DataError(
                f"calibration data {path} is not UTF-8 text ({error.reason}); convert it to UTF-8"
            ) from None
        text = raw[: error.start].decode("utf-8-sig")  # the last character was cut
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        raise DataError(f"calibration data {path} is not text (it holds NUL bytes)")
    return Document(path.name, text[:limit], cut=len(text) > limit or not whole)


def _lines(path: Path, file: _File) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a file, without reading a line of any length into memory."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
        if len(line) > MAX_LINE:
            raise DataError(
                f"{path}:{number}: more than {MAX_LINE:,} bytes in one line; split it, a document per line"
            )
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _json(path: Path) -> Iterator[Record]:
    """The objects of a JSON Lines file, or of a `.json` file that is one list."""
    advice = "give one object per line, in valid text"
    with _opened(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if _suffix(path) == ".json" and start.startswith(b"["):
            for number, record in enumerate(_json_list(path, file)):
                if not isinstance(record, dict):
                    raise DataError(f"{path}[{number}]: not an object but {type(record).__name__}; {advice}")
                yield f"{path}[{number}]", record
            return
        for number, line in _lines(path, file):
            if line.strip():
                where = f"{path}:{number}"
                yield where, parse_json(line, where, DataError, advice=advice, tag_infinities=True)


def _json_list(path: Path, file: _File) -> list[Any]:
    raw = file.read(MAX_LIST + 1)
    if len(raw) > MAX_LIST:
        raise DataError(
            f"{path} is one JSON list of more than {MAX_LIST:,} bytes; write it as JSON Lines, one object per line"
        )
    advice = "a list of objects, or one object per line, is expected"
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    found: list[Any] = parse_json(raw, str(path), DataError, top=list, advice=advice, tag_infinities=True)
    return found


def _table(path: Path) -> Iterator[Record]:
    """The rows of a table whose first line names the columns."""
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    before = csv.field_size_limit(MAX_LINE)
    try:
        with _opened(path) as file:
            lines = (line.decode() for _, line in _lines(path, file))
            rows = csv.DictReader(lines, delimiter=delimiter)
            for row in rows:
                yield f"{path}:{rows.line_num}", {k: v for k, v in row.items() if isinstance(k, str)}
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as a table: {error}") from None
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[Record]:
    with reader(str(path), DataError):
        from pyarrow import parquet  # a dependency of `datasets`

        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    yield f"{path}[{number}]", record
                    number += 1


def _folder(source: DataSource, path: Path) -> Iterator[Record]:
    """The records of a dataset folder. `datasets` tells which files a split has; text files are read here, bounded."""
    split = source.split or "train"
    with reader(f"{source.source} (split {split})", DataError) as datasets:
        if is_saved(path):
            rows = datasets.load_from_disk(str(path))
            rows = rows[split] if isinstance(rows, dict) else rows
        else:
            builder = datasets.load_dataset_builder(str(path), source.config)
            files = [Path(name) for name in (builder.config.data_files or {}).get(split, ())]
            if files and all(file.is_file() and _suffix(file) in _RECORDS for file in files):
                for file in files:
                    yield from _RECORDS[_suffix(file)](file)
                return
            rows = datasets.load_dataset(str(path), source.config, split=split, streaming=True)
        yield from _numbered(source, rows)


def _hub(source: DataSource) -> Iterator[Record]:
    """The records of a hub dataset, streamed, not downloaded whole."""
    split = source.split or "train"
    with reader(f"{source.source} (split {split})", DataError) as datasets:
        rows = datasets.load_dataset(source.source, source.config, split=split, streaming=True)
        yield from _numbered(source, rows)


def _numbered(source: DataSource, rows: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    for number, record in enumerate(rows):
        yield f"{source.source}[{number}]", record


def _joined(
    records: Iterable[Record], source: DataSource, limit: int, tokenizer: PreTrainedTokenizerBase
) -> Document:
    """One text from as many records as `limit` characters hold."""
    document = Document(source.source, "")
    parts, size = [], 0
    for where, record in records:
        text, chat = _text(where, record, source.field, tokenizer)
        document.records += 1
        if not text.strip():
            document.empty += 1
            continue
        document.chats += chat
        parts.append(text)
        size += len(text)
        document.ends.append(min(size, limit))
        if size >= limit:
            document.cut = True
            break
    document.text = "".join(parts)[:limit]
    return document


def _text(
    where: str, record: Mapping[str, Any], wanted: str | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, bool]:
    """(the text of one record: a field that is text, or the messages of a chat; whether it is a chat)."""
    present = [key for key in (FIELDS if wanted is None else (wanted,)) if key in record]
    if not present:
        raise DataError(
            f"{where}: no field {wanted or ' or '.join(FIELDS)}; it has {', '.join(map(str, record)) or 'none'}; "
            "name the one to use with `field`"
        )
    name = next((key for key in present if record[key] is not None), present[0])
    value = record[name]
    if value is None:
        return "", False
    if isinstance(value, str):
        text = value.strip("\n") + "\n\n" if value.strip() else ""
    elif isinstance(value, list):
        text = _chat(where, name, value, tokenizer) if value else ""
    else:
        raise DataError(f"{where}: field {name} is neither a text nor a list of messages")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(
            f"{where}: field {name} holds a NUL character or half of a surrogate pair (\\ud800 to \\udfff, a cut "
            "emoji); remove it"
        )
    return text, isinstance(value, list)


def _chat(where: str, name: str, messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat rendered by the tokenizer's template."""
    chat = [_message(where, name, message) for message in messages]
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: chat messages need a chat template, the tokenizer has none; give plain text"
        )
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as error:  # a template is a program of the model's maker
        raise DataError(f"{where}: the chat template refuses these messages: {error}") from error


def _message(where: str, name: str, message: Any) -> dict[str, Any]:
    """{role, content, ...}, also from ShareGPT's {from, value}."""
    if isinstance(message, Mapping):
        if "role" in message and "content" in message:
            return dict(message)
        if isinstance(message.get("from"), str) and "value" in message:
            role = ROLES.get(message["from"].lower())
            if role is None:
                raise DataError(
                    f"{where}: a message from {message['from'][:60]!r}; known: {', '.join(ROLES)}; rename it"
                )
            return {"role": role, "content": message["value"]}
    raise DataError(
        f"{where}: field {name} is neither a text nor a list of {{role, content}} or {{from, value}} messages"
    )


_RECORDS = {  # suffix -> the function that reads the records of such a file
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json),
    **dict.fromkeys((".csv", ".tsv"), _table),
    ".parquet": _parquet,
}
_KNOWN = {".txt", ".md", ".text", *_RECORDS, *_REFUSED}  # a name that ends so is a file's, not a hub id
