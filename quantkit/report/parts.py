"""What a page consists of, as values, and how numbers are written on it. The template escapes every text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from quantkit_eval.explanation import WorstToken

NONE = "–"


@dataclass(frozen=True)
class Card:
    """A number that is read first. detail: the line below it."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing. name: of its PNG. svg: markup that we drew, all foreign text in it escaped. alt: what it shows."""

    name: str
    svg: str
    caption: str
    alt: str
    wide: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a table. sort: what it is sorted by, a number or None for one that goes last; text sorts as it is."""

    text: str
    sort: float | str | None = None
    mark: bool = False


@dataclass(frozen=True)
class Column:
    title: str
    numeric: bool = False
    help: str = ""


@dataclass(frozen=True)
class Table:
    caption: str
    columns: list[Column]
    rows: list[list[Cell]]
    open: bool = True


@dataclass(frozen=True)
class Listing:
    """Text that is shown as it is, such as a recipe. folded: also if it is the only one of its section."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Tokens:
    """The worst tokens of one model."""

    title: str
    worst: list[WorstToken]


@dataclass(frozen=True)
class Section:
    """A part of the page. name: its anchor. lead: one plain sentence or two that say how to read it."""

    name: str
    title: str
    lead: str
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits: 0.0027432 -> "0.00274", 1234567 -> "1,234,567"."""
    if value is None:
        return NONE
    if value == 0 or isinstance(value, int):
        return f"{value:,.0f}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, min(places, 12))}f}" if abs(value) >= 1e-5 else f"{value:.{digits - 1}e}"


def plus_minus(value: float | None, error: float | None) -> str:
    """A value with its standard error, both to the error's second digit."""
    if value is None:
        return NONE
    if not error:
        return number(value, 4)
    if 0 < abs(value) < 1e-4:
        power = math.floor(math.log10(abs(value)))
        places = max(0, min(12, 1 - math.floor(math.log10(error)) + power))
        return f"({value / 10**power:.{places}f} ± {error / 10**power:.{places}f})e{power}"
    places = max(0, min(12, 1 - math.floor(math.log10(error))))
    return f"{value:,.{places}f} ± {error:.{places}f}"


def size(n_bytes: float | None) -> str:
    """Decimal units, as disks are sold."""
    if n_bytes is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"


def seconds(value: float | None) -> str:
    """0.0042 -> "4.2 ms", 75.2 -> "1 min 15 s"."""
    if value is None:
        return NONE
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1 and value < 60:
            return f"{value * factor:.3g} {unit}"
    if value < 60:
        return f"{value * 1e6:.3g} µs" if value else "0 s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def short(name: str, most: int = 28, end: bool = False) -> str:
    """A name that fits into a plot: its beginning, or its end."""
    name = " ".join(name.split())
    if len(name) <= most:
        return name
    return f"…{name[1 - most :]}" if end else f"{name[: most - 1]}…"


def share(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"


def text(value: object, mark: bool = False) -> Cell:
    """A cell of text; None is a dash."""
    return Cell(NONE if value is None else str(value), None if value is None else str(value), mark)


def figure(value: float | None, shown: str | None = None) -> Cell:
    """A cell of a number."""
    return Cell(number(value) if shown is None else shown, value)
