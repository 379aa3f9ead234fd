"""Speed: what was measured beside what the machine allows, and the roofline of a planned model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from quantkit.report.parts import (
    NONE,
    Cell,
    Column,
    Plot,
    Section,
    Table,
    figure,
    number,
    seconds,
    share,
    short,
    size,
    text,
)
from quantkit.report.results import Bench, BenchRow, Phase, Planned, Results, Roofline, Step
from quantkit.report.style import Ink, Studio, powers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = 6  # kinds of a stacked bar that have colours of their own


class Measured(NamedTuple):
    """A bar: what was measured and the ceiling that the roofline sets."""

    label: str
    value: float
    spread: float
    ceiling: float | None


def speed(results: Results, studio: Studio) -> Section | None:
    """The section, or None where neither a benchmark nor a roofline was given."""
    plots: list[Plot] = []
    tables: list[Table] = []
    for bench in results.benches:
        plots += _bench(studio, bench)
        tables += _bench_table(bench)
    for plan in results.plans:
        for one in plan.roofline:
            plots += _roofline(studio, plan, one)
            tables.append(_operators(plan, one))
    if not plots and not tables:
        return None
    lead = (
        "The roofline is the least time that the machine's memory bandwidth and arithmetic allow for the same "
        "work. The "
        "closer a bar comes to its mark, the less there is left to gain without a smaller model."
    )
    return Section("speed", "Speed and its ceiling", lead, plots, tables)


def _label(name: str, row: BenchRow, rows: int) -> str:
    more = [f"batch {row.batch}"] if rows > 1 else []
    return ", ".join([name, *more, *([f"after {row.context}"] if row.context else [])])


def _bench(studio: Studio, bench: Bench) -> list[Plot]:
    plots = []
    for which in ("decode", "prefill"):
        bars = [
            Measured(
                _label(model.name, row, len(model.rows)), phase.tokens_per_s.median, phase.tokens_per_s.mad or 0.0,
                phase.ceiling_tokens_per_s,
            )
            for model in bench.models
            for row in model.rows
            if (phase := _phase(row, which)) is not None
        ]  # fmt: skip
        if bars:
            plots.append(
                studio.plot(
                    f"{which} speed",
                    partial(_bars, bars=bars),
                    f"{which.capitalize()}: tokens per second, median of interleaved rounds. The mark is the "
                    "roofline.",
                    f"bars of {which} speed",
                    height=0.4 * len(bars) + 0.95,
                )
            )
    stacked = {
        _label(model.name, row, len(model.rows)): row.decode.parts_s
        for model in bench.models
        for row in model.rows
        if row.decode and row.decode.parts_s
    }
    if stacked:
        plots.append(
            studio.plot(
                "decode step by part",
                partial(_stacked, found=stacked),
                "Where the time of one decode step goes.",
                "stacked bars of the time of one decode step",
                height=0.4 * len(stacked) + 1.2,
            )
        )
    return plots


def _phase(row: BenchRow, which: str) -> Phase | None:
    return row.decode if which == "decode" else row.prefill


def _bars(axes: Axes, ink: Ink, bars: Sequence[Measured]) -> None:
    drawn = axes.barh(
        range(len(bars)), [b.value for b in bars], xerr=[b.spread for b in bars], height=0.62, color=ink["c1"],
        alpha=0.85, error_kw={"ecolor": ink["ink"], "elinewidth": 1, "capsize": 2},
    )  # fmt: skip
    for y, (bar, one) in enumerate(zip(drawn, bars, strict=True)):
        bar.set_gid(ink.say(f"{one.label}: {number(one.value)} tokens/s"))
        said = number(one.value)
        if one.ceiling:
            axes.plot([one.ceiling] * 2, [y - 0.38, y + 0.38], color=ink["c2"], linewidth=2.4)
            said += f" ({one.value / one.ceiling:.0%})"
        at = max(one.value + one.spread, one.ceiling or 0)
        axes.annotate(said, (at, y), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [short(b.label) for b in bars])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.24)
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens per second")


def _stacked(axes: Axes, ink: Ink, found: dict[str, dict[str, float]]) -> None:
    kinds = [
        k
        for k in dict.fromkeys(k for parts in found.values() for k in parts)
        if any(p.get(k) for p in found.values())
    ]
    left = [0.0] * len(found)
    for number_, kind in enumerate(kinds):
        widths = [1e3 * parts.get(kind, 0.0) for parts in found.values()]
        colour, _ = ink.series(number_ % _PARTS)
        axes.barh(
            range(len(found)), widths, left=left, color=colour, alpha=0.85, height=0.62, label=short(kind, 16)
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(found)), [short(n) for n in found])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("milliseconds")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, handlelength=1, columnspacing=1)


def _bench_table(bench: Bench) -> list[Table]:
    columns = [
        Column("model"), Column("runs as"), Column("batch", True), Column("context", True),
        Column("decode tok/s", True, "median ± median deviation over rounds"),
        Column("of roofline", True), Column("step p95", True), Column("prefill tok/s", True),
        Column("of roofline", True), Column("first token", True), Column("weights", True), Column("peak memory", True),
    ]  # fmt: skip
    rows = []
    for model in bench.models:
        for row in model.rows:
            decode, prefill = row.decode, row.prefill
            first = prefill.first_token_s.median if prefill and prefill.first_token_s else None
            p95 = (decode.step_s or {}).get("p95") if decode else None
            peak = model.memory.peak_bytes if model.memory else None
            rows.append(
                [
                    text(model.name), text(model.way), figure(row.batch), figure(row.context),
                    *_rate(decode), figure(p95, seconds(p95)), *_rate(prefill), figure(first, seconds(first)),
                    figure(model.weight_bytes, size(model.weight_bytes)), figure(peak, size(peak)),
                ]
            )  # fmt: skip
    machine = ", ".join(
        str(bench.machine[key]) for key in ("cpu", "isa", "threads", "commit") if bench.machine.get(key)
    )
    return [Table(f"Measured on {machine or 'an unnamed machine'}", columns, rows)] if rows else []


def _rate(phase: Phase | None) -> list[Cell]:
    if phase is None:
        return [figure(None), figure(None)]
    median, mad = phase.tokens_per_s.median, phase.tokens_per_s.mad
    said = number(median) + (f" ± {number(mad, 2)}" if mad else "")
    return [figure(median, said), figure(phase.roofline_share, share(phase.roofline_share))]


def _roofline(studio: Studio, plan: Planned, one: Roofline) -> list[Plot]:
    return [
        studio.plot(
            "roofline",
            partial(_roof, one=one),
            f"{plan.name} on {one.hardware.title}: every operator of one forward. Left of the bend the memory "
            "decides, right "
            "of it the arithmetic. A decode step reads all weights for one token, so it sits on the left.",
            "roofline with the operators of prefill and decode",
            height=3.6,
        ),
        studio.plot(
            "time by operator",
            partial(_steps, steps={"prefill": one.prefill, "decode": one.decode}),
            f"Least time by operator, {plan.batch} × {plan.context} tokens. At most "
            f"{number(one.prefill.tokens_per_s)} tokens/s of "
            f"prefill and {number(one.decode.tokens_per_s)} of decode.",
            "share of each operator in the least time",
            height=3.6,
        ),
    ]


def _roof(axes: Axes, ink: Ink, one: Roofline) -> None:
    points = [op for step in (one.prefill, one.decode) for op in step.operators if op.intensity]
    low = min([op.intensity or 1 for op in points], default=0.1) / 2
    high = max(
        [
            *(op.intensity or 1 for op in points),
            *(p / one.hardware.bandwidth * 4 for p in one.hardware.peak.values()),
        ]
    )
    for kind, peak in one.hardware.peak.items():
        bend = peak / one.hardware.bandwidth
        if any(op.kind == kind for op in points):
            xs = [low, bend, max(high, bend)]
            axes.plot(
                xs,
                [x * one.hardware.bandwidth if x < bend else peak for x in xs],
                color=ink["muted"],
                linewidth=1.2,
            )
            axes.annotate(
                f"{short(kind, 12)} {number(peak / 1e12)} TOP/s", (max(high, bend), peak), (0, 4),
                textcoords="offset points", ha="right", fontsize=9, color=ink["muted"],
            )  # fmt: skip
    for number_, (name, step) in enumerate((("prefill", one.prefill), ("decode", one.decode))):
        colour, marker = ink.series(number_)
        for op in step.operators:
            if op.intensity:
                rate = op.attainable_operations_per_s
                dot = axes.plot(
                    [op.intensity], [rate], marker, color=colour, markersize=5.5, alpha=0.8, linestyle="none"
                )[0]
                dot.set_gid(
                    ink.say(
                        f"{name}, {op.name}: {number(op.intensity)} operations per byte, bound by {op.bound}"
                    )
                )
        axes.plot([], [], marker, color=colour, label=name, linestyle="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    powers(axes.xaxis, axes.yaxis)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("attainable operations per second")
    axes.grid(True, linewidth=0.7)
    axes.legend(loc="lower right")


def _steps(axes: Axes, ink: Ink, steps: dict[str, Step]) -> None:
    """Shares, so that a prompt and a single token can stand beside each other."""
    ranked: dict[str, float] = {}
    for step in steps.values():
        for op in step.operators:
            ranked[op.name] = max(ranked.get(op.name, 0.0), op.seconds / step.seconds)
    names = sorted(ranked, key=lambda name: -ranked[name])[:10]
    for number_, (which, step) in enumerate(steps.items()):
        colour, _ = ink.series(number_)
        found = dict.fromkeys(names, 0.0)
        for op in step.operators:
            if op.name in found:
                found[op.name] += 100 * op.seconds / step.seconds
        places = [y + 0.36 * number_ for y in range(len(names))]
        label = f"{which}, {seconds(step.seconds)}"
        axes.barh(places, list(found.values()), height=0.34, color=colour, alpha=0.85, label=label)
    axes.set_yticks([y + 0.18 for y in range(len(names))], [short(n, 24, end=True) for n in names])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of the least time (%)")
    axes.legend(loc="lower right")


def _operators(plan: Planned, one: Roofline) -> Table:
    columns = [
        Column("step"), Column("operator"), Column("count", True), Column("operations", True), Column("bytes", True),
        Column("ops/byte", True), Column("in"), Column("bound by"), Column("least time", True),
    ]  # fmt: skip
    rows = [
        [
            text(which), text(op.name), figure(op.count),
            figure(op.operations * op.count, f"{op.operations * op.count:.3g}"),
            figure(op.bytes * op.count, size(op.bytes * op.count)), figure(op.intensity), text(op.kind), text(op.bound),
            figure(op.seconds, seconds(op.seconds)),
        ]
        for which, step in (("prefill", one.prefill), ("decode", one.decode))
        for op in step.operators
    ]  # fmt: skip
    return Table(f"Operators of {plan.name or NONE} on {one.hardware.title}", columns, rows, open=False)
