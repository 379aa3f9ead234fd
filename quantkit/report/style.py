"""How plots are drawn: matplotlib, into SVG whose colours are the page's own variables, or into PNG.

An SVG on the page must change with it from light to dark. matplotlib knows fixed colours only, so for the page every
colour is a placeholder, which becomes `var(--name)` in the markup. PNGs are drawn with the light colours.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantkit.report.parts import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_FONT = "--sans"
NARROW = 5.0  # inches: a plot that shares a row with another one
WIDE = 10.4
_LIGHT = {
    "ink": "#1c1d21", "muted": "#666a73", "line": "#dcdad5", "heat": "#d9722b",
    "c1": "#2f6db3", "c2": "#c8601b", "c3": "#2b8a5b", "c4": "#8256b5", "c5": "#bf3b53", "c6": "#1b8795",
}  # fmt: skip
_PLACE = {name: f"#0b0c{number + 16:02x}" for number, name in enumerate(_LIGHT)}
SERIES = tuple(name for name in _LIGHT if name.startswith("c"))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quantkit",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "text.parse_math": False,  # a name with two dollars is a name
}


@dataclass(frozen=True)
class Ink:
    """The colours that a plot is drawn with, by name; and the texts that appear when one points at a mark."""

    colours: Mapping[str, str]
    said: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        return self.colours[name]

    def series(self, number: int) -> tuple[str, str]:
        """(colour, marker) of a series."""
        return self.colours[SERIES[number % len(SERIES)]], _MARKERS[number % len(_MARKERS)]

    def say(self, text: str) -> str:
        """The id of a mark that says `text`."""
        name = f"said-{len(self.said)}"
        self.said[name] = text
        return name


_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def powers(*axes: Axis) -> None:
    """Label a logarithmic axis with powers of ten; matplotlib's own labels are mathematics, which is switched off."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda v, _: "10" + f"{math.log10(v):.0f}".translate(_RAISED)))
        axis.set_minor_formatter(NullFormatter())


Drawing = Callable[["Axes", Ink], None]


@dataclass
class Studio:
    """Draws plots and gives each a name. pngs: None, or name -> PNG, if they are wanted."""

    pngs: dict[str, bytes] | None = None
    drawn: int = 0

    def plot(
        self, name: str, draw: Drawing, caption: str, alt: str, height: float = 3.4, wide: bool = False
    ) -> Plot:
        """Draw on fresh axes."""
        self.drawn += 1
        name = f"{self.drawn:02d}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"
        width = WIDE if wide else NARROW
        ink = Ink(_PLACE)
        svg = _svg(_figure(draw, ink, width, height), f"p{self.drawn}-", ink)
        if self.pngs is not None:
            light = Ink(_LIGHT)
            self.pngs[f"{name}.png"] = _png(_figure(draw, light, width, height), light)
        return Plot(name, svg, caption, alt, wide)


def _settings(ink: Ink) -> dict[Any, Any]:
    """What matplotlib's own settings are while a plot is made and written; some colours are looked up only then."""
    from cycler import cycler

    colours: dict[Any, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), ink["ink"])
    colours |= dict.fromkeys(("xtick.color", "ytick.color"), ink["muted"])
    colours |= {"axes.edgecolor": ink["muted"], "grid.color": ink["line"], "legend.labelcolor": ink["ink"]}
    return _SETTINGS | colours | {"axes.prop_cycle": cycler(color=[ink[name] for name in SERIES])}


def _figure(draw: Drawing, ink: Ink, width: float, height: float) -> Figure:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_settings(ink)):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot(), ink)
    return figure


def _svg(figure: Figure, prefix: str, ink: Ink) -> str:
    """The `<svg>` element alone, with ids of its own on the page and the page's colours and fonts."""
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context(_settings(ink)):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    markup = stream.getvalue()
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    for name, text in ink.said.items():
        shown = f'<g id="{name}"><title>{html.escape(text)}</title>'
        markup = markup.replace(f'<g id="{name}">', shown)
    markup = re.sub(r'\bid="', f'id="{prefix}', markup)
    markup = re.sub(r'(href="|url\()#', rf"\1#{prefix}", markup)
    for name, colour in _PLACE.items():
        markup = markup.replace(colour, f"var(--{name})")
    markup = re.sub(r"font: ([\d.]+px) 'DejaVu Sans'[^;\"]*", rf"font: \1 var({_FONT})", markup)
    markup = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", markup, count=1)
    return re.sub(r'<svg ([^>]*?)height="[^"]*"', r'<svg \1role="img"', markup, count=1)


def _png(figure: Figure, ink: Ink) -> bytes:
    import matplotlib as mpl

    stream = io.BytesIO()
    with mpl.rc_context(_settings(ink)):
        figure.savefig(stream, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return stream.getvalue()
