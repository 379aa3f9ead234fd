"""Where the divergence comes from: its distribution over tokens, the worst of them, and what each layer costs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from quantkit_eval.explanation import Explanation, Restored

from quantkit.report.layers import heat, label_of, position
from quantkit.report.parts import Column, Plot, Section, Table, Tokens, figure, number, share, short, text
from quantkit.report.results import Results
from quantkit.report.style import Ink, Studio, powers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 16  # bars


def explained(results: Results, studio: Studio) -> Section | None:
    """The section, or None where no evaluation was explained."""
    found = [(each.name, each.explanation) for each in results.evaluations if each.explanation is not None]
    if not found:
        return None
    plots: list[Plot] = []
    tables, tokens, notes = [], [], []
    for name, one in found:
        label = f"{name}: " if len(found) > 1 else ""
        plots.append(_distribution(studio, one, label))
        if one.restored:
            plots += _attribution(studio, one, label)
            tables.append(_table(one, label))
            notes.append(label + _sentence(one))
        tokens.append(Tokens(name if len(found) > 1 else "", one.worst))
    lead = (
        "Most tokens hardly change; the few with the largest KL are where a reader would notice. Each quantized "
        "layer was put "
        "back to full precision in turn on the windows that hold them: what KL then falls by is that layer's "
        "doing, measured "
        "and not estimated."
    )
    return Section("explanation", "Which tokens, and which layers", lead, plots, tables, tokens, notes)


def _distribution(studio: Studio, one: Explanation, label: str) -> Plot:
    return studio.plot(
        "kl distribution",
        partial(_histogram, one=one),
        f"{label}KL of {one.tokens:,} tokens, on a logarithmic axis. Dashed lines: half, 99 and 99.9 of 100 "
        "tokens lie to the left.",
        "histogram of the KL per token",
    )


def _histogram(axes: Axes, ink: Ink, one: Explanation) -> None:
    edges, counts = one.kl_edges, one.kl_counts
    used = [i for i, count in enumerate(counts) if count]
    low, high = used[0], used[-1] + 1
    widths = [right - left for left, right in pairwise(edges)]
    axes.bar(
        edges[low:high], counts[low:high], widths[low:high], align="edge", color=ink["c1"], alpha=0.75,
        edgecolor="none",
    )  # fmt: skip
    axes.set_xscale("log")
    powers(axes.xaxis)
    axes.set_xlim(edges[low], edges[high])
    top = max(counts)
    for name, height, at in (("0.5", 1.1, "median"), ("0.99", 1.02, "p99"), ("0.999", 0.94, "p99.9")):
        value = one.quantiles.get(name)
        if value and edges[low] < value < edges[high]:
            axes.axvline(value, color=ink["ink"], linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(
                f"{at} {number(value, 2)}", (value, top * height), (3, 0), textcoords="offset points", fontsize=9,
                color=ink["ink"],
            )  # fmt: skip
    axes.set_ylim(0, top * 1.16)
    axes.set_xlabel("KL (nats)")
    axes.set_ylabel("tokens")


def _attribution(studio: Studio, one: Explanation, label: str) -> list[Plot]:
    """Bars of the largest effects, and where units are layers of blocks, a heat map."""
    top = [each for each in one.restored if each.removed > 0][:_SHOWN] or one.restored[:1]
    plots = [
        studio.plot(
            "restored layers",
            partial(_bars, top=top, whole=one.kl_mean or 0),
            f"{label}How much of the KL on the worst windows goes away when one {one.by or 'part'} is restored to "
            "full precision; "
            f"the {len(top)} largest effects.",
            "bars of the KL that each restored layer removes",
            height=max(2.2, 0.25 * len(top) + 0.9),
        )
    ]
    cells = {}
    for each in one.restored:
        where = position(each.unit)
        if where is not None:
            cells[where] = max(0.0, each.removed) / (one.kl_mean or 1)
    if len({kind for _, kind in cells}) > 1:
        plots.append(
            heat(
                studio, "attribution", cells, lambda v: f"{100 * v:.0f}", log=False,
                caption=f"{label}Percent of that KL that goes away with each of them; the first block is at the top.",
            )
        )  # fmt: skip
    return plots


def _bars(axes: Axes, ink: Ink, top: Sequence[Restored], whole: float) -> None:
    shares = [100 * each.removed / whole if whole else 0.0 for each in top]
    bars = axes.barh(range(len(top)), shares, color=ink["heat"], alpha=0.85, height=0.7)
    for bar, each, value in zip(bars, top, shares, strict=True):
        bar.set_gid(ink.say(f"{each.unit}: {value:.1f} %"))
        axes.annotate(
            f"{value:.1f}", (max(value, 0), bar.get_y() + 0.35), (3, 0), textcoords="offset points", va="center",
            fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(top)), [_short(each.unit) for each in top])
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    axes.set_xlabel("KL removed (%)")


def _short(unit: str) -> str:
    """The name of a unit as it fits beside a bar: its block's number and what is behind it."""
    where = position(unit)
    if where is None or where[0] is None:
        return short(unit, end=True)
    return f"{where[0]} {label_of(where[1])}"


def _table(one: Explanation, label: str) -> Table:
    rows = [
        [
            text(each.unit), figure(each.kl_mean), figure(each.removed),
            figure(each.removed, share(each.removed / one.kl_mean) if one.kl_mean else ""),
        ]
        for each in one.restored
    ]  # fmt: skip
    columns = [
        Column("restored"), Column("KL then", True, "mean over the worst windows, nats"), Column("less by", True),
        Column("share", True),
    ]  # fmt: skip
    return Table(f"{label}Every restored {one.by or 'part'}", columns, rows, open=False)


def _sentence(one: Explanation) -> str:
    """What adds up and what does not."""
    first = one.restored[0]
    total = sum(each.removed for each in one.restored)
    rest = one.kl_all_restored or 0.0
    return (
        f"On the {len(one.windows)} windows that hold the worst tokens the mean KL is {number(one.kl_mean)} nats. "
        f"{first.unit} has the largest effect "
        f"({share(first.removed / one.kl_mean) if one.kl_mean else number(first.removed)}). "
        f"The single effects add up to {number(total)}; they need not add up to the whole, since layers act on "
        "each other. "
        f"With everything restored {number(rest, 2)} is left."
    )
