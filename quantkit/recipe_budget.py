"""The part of a recipe that says what a run may use of the machine: `budget`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from quantkit.recipe_schemes import Part

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b", re.ASCII | re.IGNORECASE)
_MOST = 1 << 60


def bytes_of(value: Any) -> Any:
    """8GiB -> 8589934592, 500MB -> 500000000; a number is bytes already. ValueError for any other text."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"a size is a number and a unit, such as 8GiB or 500MB, got {value!r}")
    units = _BINARY if found[3] else _UNITS
    return int(float(found[1]) * units[found[2].lower()])


Size = Annotated[int, BeforeValidator(bytes_of), Field(ge=1, le=_MOST)]


class BudgetPart(Part):
    """The most that a run may use; None: no limit. It changes how a run works, never what it writes.

    ram: peak resident memory of the process, in bytes. vram: memory of the GPU. disk: what is written into the output
    folder, with what a resumed run needs.
    """

    ram: Size | None = None
    vram: Size | None = None
    disk: Size | None = None
