"""Reading JSON that somebody else wrote, within bounds and with errors that name the file; without torch.

Every JSON file of a checkpoint (`config.json`, an index, a manifest, a safetensors header) goes through here. A file
is refused when it is larger than the reader allows, when it is nested more than 64 levels deep, when one object has a
key twice, when it holds NaN, an infinity or a number too large for a float, or text that cannot be written as UTF-8.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from quantkit.errors import ModelError, QuantkitError

MAX_BYTES = 100_000_000  # of one file; the safetensors library has the same limit for a header
MAX_DEPTH = 64  # of lists and objects inside each other
DAMAGED = "the file is corrupt, fetch it again"
_TYPES: dict[type, str] = {dict: "an object", list: "a list"}


def read_json(
    path: Path,
    error: type[QuantkitError] = ModelError,
    *,
    limit: int = MAX_BYTES,
    top: type = dict,
    advice: str = DAMAGED,
    tag_infinities: bool = False,
) -> Any:
    """The object (or list: `top`) in the JSON file `path`; otherwise `error`, naming the file and ending with `advice`.

    limit: largest size in bytes. tag_infinities: return `Infinity`, `-Infinity` and `NaN` as {"__float__": "Infinity"},
    which is how transformers 5 writes them into config.json, instead of refusing them.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise error(f"{path} has {size} bytes, more than the {limit} allowed; {advice}")
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except (OSError, ValueError) as problem:  # ValueError: a path that holds a NUL character
        raise error(f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}") from problem
    return parse_json(
        raw, str(path), error, limit=limit, top=top, advice=advice, tag_infinities=tag_infinities
    )


def parse_json(
    raw: bytes,
    what: str,
    error: type[QuantkitError] = ModelError,
    *,
    limit: int = MAX_BYTES,
    top: type = dict,
    advice: str = DAMAGED,
    tag_infinities: bool = False,
) -> Any:
    """Like `read_json`, for bytes that are already in memory; `what` names them in errors."""
    if len(raw) > limit:
        raise error(f"{what} has {len(raw)} bytes, more than the {limit} allowed; {advice}")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_tagged if tag_infinities else _refuse_constant,
        )
        if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:  # else it cannot be deeper
            _check_depth(value)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{what} holds half of a UTF-16 character pair (\\ud800 to \\udfff); {advice}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{what} is not valid JSON ({problem}); {advice}") from None
    if not isinstance(value, top):
        raise error(f"{what} must hold {_TYPES[top]}, got {_kind(value)}; {advice}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} appears twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:60]} is too large")
    return number


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _tagged(text: str) -> dict[str, str]:
    return {"__float__": text}


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
