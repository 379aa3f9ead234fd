"""Quality against size: every measured configuration, its error bars, and the front that no other one beats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from quantkit_eval.report import Report

from quantkit.report.parts import (
    NONE,
    Cell,
    Column,
    Section,
    Table,
    figure,
    number,
    plus_minus,
    seconds,
    share,
    short,
    size,
    text,
)
from quantkit.report.results import Evaluation, Point, Results, Sweep, SweepCell
from quantkit.report.style import Ink, Studio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUMBERED = 14  # points of a front that get a number; more would cover each other


@dataclass(frozen=True)
class Axis:
    """What a plot measures. of: the value of a point, or None. error: its standard error."""

    name: str
    label: str
    of: Callable[[Point], float | None]
    error: Callable[[Report], float | None] = lambda report: None


def _kl(point: Point) -> float | None:
    return point.evaluation.kl_mean if point.evaluation else None


def _perplexity(point: Point) -> float | None:
    return point.evaluation.quantized.perplexity if point.evaluation else None


KL = Axis("KL", "mean KL to the original (nats per token)", _kl, lambda report: report.kl_mean_se)
PERPLEXITY = Axis("perplexity", "perplexity", _perplexity, lambda report: report.quantized.perplexity_se)
BITS = Axis("bits", "bits per weight of the quantized layers", lambda point: point.bits)
SIZE = Axis("size", "size of all tensors (MB)", lambda point: point.n_bytes and point.n_bytes / 1e6)
MEMORY = Axis(
    "memory",
    "weights and KV cache of one long context (MB)",
    lambda point: point.memory and point.memory / 1e6,
)


def front(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """The points of which no other is at most as large and better, by size."""
    known = [p for p in points if x.of(p) is not None and y.of(p) is not None]
    best, found = math.inf, []
    for point in sorted(known, key=lambda p: (x.of(p), y.of(p))):
        value = y.of(point)
        if value is not None and value < best:
            best = value
            found.append(point)
    return found


def quality(results: Results, studio: Studio) -> Section | None:
    """The section, or None where nothing was evaluated."""
    points = [p for p in results.points if p.evaluation is not None]
    others = [e for e in results.evaluations if not any(results.belongs(e, c) for c in results.checkpoints)]
    if not points and not others:
        return None
    plots = []
    if len(points) > 1:
        for y, against in ((KL, (BITS, SIZE, MEMORY)), (PERPLEXITY, (BITS, SIZE))):
            for x in against:
                known = [p for p in points if x.of(p) is not None and y.of(p) is not None]
                if _apart([value for p in known if (value := x.of(p)) is not None]):
                    plots.append(
                        studio.plot(
                            f"{y.name} against {x.name}",
                            partial(_trade, points=known, x=x, y=y),
                            f"{'KL' if y is KL else 'Perplexity'} against {x.name}; bars are one standard error.",
                            f"{y.label} of {len(known)} configurations over {x.label}",
                            height=3.9,
                        )
                    )
    tables = [_table(points)] if points else []
    if others:
        tables.append(_evaluations(others))
    tables += [table for sweep in results.sweeps if (table := _decisions(sweep)) is not None]
    lead = (
        "Lower is better everywhere but for agreement. KL says how far the next-token distribution moved from the "
        "original's; it is paired token by token, so it separates configurations that perplexity cannot."
    )
    if plots:
        lead += " The lines join what nothing of the same size or smaller beats; their numbers are those of the table."
    return Section("quality", "Quality and size", lead, plots, tables)


def _apart(values: Sequence[float]) -> bool:
    """Whether there is something to plot against: values that differ by more than half a percent."""
    return len(values) > 1 and max(values) - min(values) > 0.005 * max(values)


def numbered(points: Sequence[Point]) -> dict[str, int]:
    """The numbers of the configurations on the front of KL against size, by size."""
    return {p.name: i + 1 for i, p in enumerate(front(points, SIZE, KL)[:_NUMBERED])}


def _trade(axes: Axes, ink: Ink, points: Sequence[Point], x: Axis, y: Axis) -> None:
    groups = sorted({p.group for p in points})
    for point in points:
        colour, marker = ink.series(groups.index(point.group))
        at, value = x.of(point), y.of(point)
        assert at is not None
        assert value is not None
        assert point.evaluation is not None
        error = y.error(point.evaluation)
        axes.errorbar(
            [at], [value], yerr=[error] if error else None, fmt="none", ecolor=colour, elinewidth=1, capsize=2
        )
        dot = axes.plot(
            [at], [value], marker, color=colour, markersize=6, alpha=0.9, markeredgewidth=0, linestyle="none"
        )[0]
        dot.set_gid(ink.say(f"{point.name}: {y.name} {plus_minus(value, error)}, {x.name} {number(at, 4)}"))
    best, names = front(points, x, y), numbered(points)
    line = [(at, value) for p in best if (at := x.of(p)) is not None and (value := y.of(p)) is not None]
    axes.plot(
        [at for at, _ in line], [value for _, value in line], color=ink["muted"], linewidth=1.1, zorder=1
    )
    for turn, point in enumerate(p for p in best if p.name in names):
        side = ("left", (5, 5)) if turn % 2 else ("right", (-5, -10))  # neighbours must not cover each other
        axes.annotate(
            str(names[point.name]), (x.of(point), y.of(point)), side[1], textcoords="offset points", ha=side[0],
            fontsize=9, color=ink["ink"],
        )  # fmt: skip
    _scale(axes, [v for p in points if (v := y.of(p))])
    if y is PERPLEXITY:
        _original(axes, ink, points)
    for number_, group in enumerate(groups):
        colour, marker = ink.series(number_)
        axes.plot([], [], marker, color=colour, label=short(group, 22), markersize=6, linestyle="none")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, handletextpad=0.1, columnspacing=0.9)
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    axes.grid(True, linewidth=0.7)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the values span more than a factor of three; with plain numbers on the axis."""
    if values and min(values) > 0 and max(values) > 3 * min(values):
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        decades = math.log10(max(values) / min(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v, 1)))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _original(axes: Axes, ink: Ink, points: Sequence[Point]) -> None:
    """The perplexity of the original, if all have the same."""
    found = {
        round(p.evaluation.original.perplexity, 6) for p in points if p.evaluation and p.evaluation.original
    }
    if len(found) == 1:
        value = found.pop()
        axes.axhline(value, color=ink["muted"], linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"original {number(value, 4)}", (0.72, value), (0, 4), xycoords=("axes fraction", "data"),
            textcoords="offset points", fontsize=9, ha="center", color=ink["muted"],
        )  # fmt: skip


def _table(points: Sequence[Point]) -> Table:
    """One row per configuration; columns that nobody has are left out."""
    best = numbered(points) if len(points) > 1 else {}
    rows, optional = [], []
    for point in points:
        report = point.evaluation
        assert report is not None
        ratio = point.n_bytes / point.original_bytes if point.n_bytes and point.original_bytes else None
        shrunk = f"{size(point.n_bytes)}" + (f" ({ratio:.0%})" if ratio else "")
        mark = point.name in best
        front_ = Cell(str(best[point.name]), best[point.name], True) if mark else Cell("", None)
        rows.append(
            [
                front_, text(point.name, mark), text(point.group), figure(point.bits, number(point.bits, 4)),
                figure(point.n_bytes, shrunk), *_scores(report),
            ]
        )  # fmt: skip
        optional.append(
            [
                figure(point.decode, number(point.decode)),
                figure(point.faster and point.faster[0], plus_minus(*(point.faster or (None, None)))),
                figure(point.prefill, number(point.prefill)),
                figure(point.peak, size(point.peak)),
                figure(point.seconds, seconds(point.seconds)),
            ]
        )
    columns = [
        Column("front", True, "number on the front of KL against size"),
        Column("configuration"),
        Column("method"),
        Column("bits/weight", True, "of the quantized layers, counted from stored bytes with scales"),
        Column("size", True, "bytes of all tensors, and their share of the original's"),
        *_SCORES,
    ]
    more = [
        Column("decode tok/s", True, "one sequence"),
        Column("× original", True, "decode speed over the original model's, run in turn; ± median deviation"),
        Column("prefill tok/s", True, "one sequence"),
        Column("peak memory", True, "of the run that quantized it"),
        Column("time", True, "to quantize and evaluate"),
    ]
    used = [i for i in range(len(more)) if any(row[i].sort is not None for row in optional)]
    table = [row + [extra[i] for i in used] for row, extra in zip(rows, optional, strict=True)]
    columns += [more[i] for i in used]
    first = 0 if best else 1
    return Table("All configurations", columns[first:], [row[first:] for row in table])


_SCORES = (
    Column("perplexity", True),
    Column("Δ NLL", True, "mean negative log-likelihood minus the original's, paired, nats per token"),
    Column("KL mean", True, "nats per token"),
    Column("KL p99", True, "99 of 100 tokens lie below"),
    Column("same top token", True, "share of tokens for which both find the same next token likeliest"),
)


def _scores(report: Report) -> list[Cell]:
    fit = report.quantized
    return [
        figure(fit.perplexity, plus_minus(fit.perplexity, fit.perplexity_se)),
        figure(report.delta_nll, plus_minus(report.delta_nll, report.delta_nll_se)),
        figure(report.kl_mean, plus_minus(report.kl_mean, report.kl_mean_se)),
        figure(report.kl_p99),
        figure(report.top1_agreement, share(report.top1_agreement)),
    ]


def _evaluations(found: Sequence[Evaluation]) -> Table:
    """Evaluations that belong to no checkpoint here."""
    columns = [Column("evaluation"), Column("model"), Column("baseline"), Column("tokens", True), *_SCORES]
    rows = [
        [
            text(e.name),
            text(e.model),
            text(e.baseline),
            figure(e.report.tokens, f"{e.report.tokens:,}"),
            *_scores(e.report),
        ]
        for e in found
    ]
    return Table("Evaluations", columns, rows)


def _decisions(sweep: Sweep) -> Table | None:
    """What the paired statistics decide by KL between configurations that differ in the method alone."""
    if sweep.decisions is None:
        return None
    cells = {cell.id: cell for cell in sweep.cells}
    pairs = [p for p in sweep.decisions.pairs if p.metric == "kl" and p.a in cells and p.b in cells]
    rivals = [p for p in pairs if _class(cells[p.a]) == _class(cells[p.b])]
    columns = [
        Column("A"), Column("B"), Column("A − B, KL", True), Column("p, corrected", True), Column("A better?"),
    ]  # fmt: skip
    rows = [
        [
            text(d.a), text(d.b), figure(d.difference, plus_minus(d.difference, d.se)), figure(d.p_corrected),
            text(d.better, d.better == "yes"),
        ]
        for d in rivals
    ]  # fmt: skip
    if not rows:
        return None
    alpha = NONE if sweep.decisions.alpha is None else f"{sweep.decisions.alpha:g}"
    correction = str(sweep.decisions.correction or "no").capitalize()
    caption = (
        "Is A closer to the original than B? Rivals that differ in the method alone, on the same windows of text; "
        f"{correction} correction over all {len(pairs)} pairs, error rate {alpha}"
    )
    return Table(caption, columns, rows, open=len(rows) <= 16)


def _class(cell: SweepCell) -> tuple[object, ...]:
    """What rivals have in common."""
    same = ("preset", "bits", "group_size", "symmetric", "inputs", "kv_cache")
    return tuple(str(cell.factors.get(key)) for key in same)
