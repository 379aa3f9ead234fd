"""The curve of a searched strength as an SVG: mean KL with standard errors, one panel per model."""

from __future__ import annotations

import math
from typing import Any

WIDTH, HEIGHT, LEFT, TOP = 380, 260, 56, 34  # of a panel's plot, and what lies around it
INK, LINE, NONE = "#333333", "#1f6fb4", "#c0392b"


def plot(rows: list[dict[str, Any]]) -> str:
    """The SVG. rows: of docs/benchmarks/strength.json; KL on a logarithmic axis, the dashed line is no smoothing."""
    step = WIDTH + LEFT + 24
    panels = [_panel(row, number * step + LEFT) for number, row in enumerate(rows)]
    width, height = step * len(rows) + 12, HEIGHT + TOP + 46
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="{INK}">\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n{"".join(panels)}</svg>\n'
    )


def _panel(row: dict[str, Any], left: int) -> str:
    trials = row["search"]["trials"]
    low = min(t["loss"] - t["loss_se"] for t in trials) / 1.05
    high = max(t["loss"] + t["loss_se"] for t in trials) * 1.05
    chosen = row["search"].get("strength")

    def x(strength: float) -> float:
        return left + WIDTH * strength

    def y(loss: float) -> float:
        return TOP + HEIGHT * math.log(high / loss) / math.log(high / low)

    parts = [
        f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbbbbb"/>',
        _text(left + WIDTH / 2, 20, f"{row['model']} model", "middle"),
        _text(left + WIDTH / 2, TOP + HEIGHT + 36, "strength", "middle"),
        _text(left - 6, TOP - 8, "KL x 1e-3", "end"),
    ]
    parts += [_text(x(tick / 4), TOP + HEIGHT + 18, f"{tick / 4:g}", "middle") for tick in range(5)]
    for tick in range(5):
        loss = low * (high / low) ** (tick / 4)
        parts.append(_text(left - 6, y(loss) + 4, f"{1e3 * loss:.3g}", "end"))
    curve = [t for t in trials if t.get("strength") is not None]
    points = " ".join(f"{x(t['strength']):.1f},{y(t['loss']):.1f}" for t in curve)
    parts.append(f'<polyline points="{points}" fill="none" stroke="{LINE}" stroke-width="1.5"/>')
    for t in curve:
        at, ends = x(t["strength"]), (y(t["loss"] - t["loss_se"]), y(t["loss"] + t["loss_se"]))
        parts.append(_line(at, ends[0], at, ends[1], LINE))
        size = 5 if t["strength"] == chosen else 2.5
        parts.append(f'<circle cx="{at:.1f}" cy="{y(t["loss"]):.1f}" r="{size}" fill="{LINE}"/>')
    for t in trials:
        if t.get("strength") is None:
            parts.append(_line(left, y(t["loss"]), left + WIDTH, y(t["loss"]), NONE, dashes="5 4"))
            said = "no smoothing (chosen)" if chosen is None else "no smoothing"
            parts.append(_text(left + WIDTH - 4, y(t["loss"]) - 5, said, "end", NONE))
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, said: str, anchor: str, color: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{said}</text>'


def _line(x: float, y: float, x2: float, y2: float, color: str, dashes: str = "") -> str:
    style = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{style}/>'
