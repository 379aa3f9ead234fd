"""Sizes in a recipe: `6GiB`, `500MB`, or a number of bytes."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b", re.ASCII | re.IGNORECASE)
_MOST = 1 << 60


def bytes_of(value: Any) -> Any:
    """8GiB -> 8589934592, 500MB -> 500000000; a number is bytes already. ValueError for any other text."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"a size is a number and a unit, such as 6GiB or 500MB, got {value!r}")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def size_text(n_bytes: float, digits: int = 2) -> str:
    """As a recipe writes it: 1610612736 -> "1.50 GiB"."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if n_bytes >= size:
            return f"{n_bytes / size:.{digits}f} {unit}"
    return f"{n_bytes:.0f} B"


Size = Annotated[int, BeforeValidator(bytes_of), Field(ge=1, le=_MOST)]
