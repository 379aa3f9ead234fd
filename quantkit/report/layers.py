"""What became of each layer: its error as a heat map, the tokens its experts saw, and the table of all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.records import LayerRecord
from quantkit.report.parts import Cell, Column, Plot, Section, Table, figure, number, short, text
from quantkit.report.results import Checkpoint, Results
from quantkit.report.style import Ink, Studio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Place = tuple[int | None, str]  # block (None: outside them), kind
_BLOCK = re.compile(r"^[^\d]*?\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"\bexperts\.\d+\.")
_CELLS = 1200  # that are drawn with their values; more become an image


def position(name: str) -> Place | None:
    """(block, kind) of a layer: "model.layers.3.mlp.experts.7.up_proj" -> (3, "mlp.experts.up_proj")."""
    match = _BLOCK.match(name)
    if match is None:
        return (None, name) if name else None
    return int(match[1]), _EXPERT.sub("experts.", match[2])


def layers(results: Results, studio: Studio) -> Section | None:
    """The section, or None where no checkpoint has quantized layers."""
    found = [each for each in results.checkpoints if each.manifest.layers]
    if not found:
        return None
    plots, tables = [], []
    for each in found:
        label = f"{each.name}: " if len(found) > 1 else ""
        errors = _errors(each.manifest.layers)
        if errors:
            plots.append(
                heat(
                    studio, "layer errors", errors, lambda v: number(v, 2), log=True,
                    caption=f"{label}Error of each layer's output on the calibration text, as a share of that output "
                    "(squared). Stronger colour is worse, on a logarithmic scale; experts are averaged.",
                )
            )  # fmt: skip
        plots += _experts(studio, each, label)
        tables.append(_table(each, label))
    lead = (
        "How much rounding changed what each layer computes, before the layers after it could correct or amplify "
        "it. A "
        "large error in one layer need not matter much for the text."
    )
    return Section("layers", "Layer by layer", lead, plots, tables)


def _error(layer: LayerRecord) -> float | None:
    return layer.weight_error if layer.relative_error is None else layer.relative_error


def _errors(found: list[LayerRecord]) -> dict[Place, float]:
    """Mean error of the layers at each place."""
    values: dict[Place, list[float]] = {}
    for layer in found:
        where, error = position(layer.name), _error(layer)
        if where is not None and error is not None:
            values.setdefault(where, []).append(error)
    return {where: fmean(each) for where, each in values.items()}


def heat(
    studio: Studio,
    name: str,
    cells: Mapping[Place, float],
    shown: Callable[[float], str],
    log: bool,
    caption: str,
) -> Plot:
    """A heat map, block by kind."""
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    blocks = sorted({block for block, _ in cells if block is not None})
    rows: list[int | None] = [*blocks, *([None] if any(block is None for block, _ in cells) else [])]
    height = max(2.4, 0.27 * len(rows) + 1.3)
    wide = len(kinds) > 9
    draw = partial(_heat, cells=cells, rows=rows, kinds=kinds, shown=shown, log=log)
    return studio.plot(
        name, draw, caption, f"heat map, {len(rows)} blocks by {len(kinds)} kinds", height, wide
    )


def _heat(
    axes: Axes,
    ink: Ink,
    cells: Mapping[Place, float],
    rows: list[int | None],
    kinds: list[str],
    shown: Callable[[float], str],
    log: bool,
) -> None:
    from matplotlib.patches import Rectangle

    strength = _strengths(cells, log)
    small = len(rows) * len(kinds) <= _CELLS
    for (block, kind), value in cells.items():
        x, y = kinds.index(kind), rows.index(block)
        cell = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=ink["heat"], alpha=strength[block, kind])
        cell.set_gid(
            ink.say(
                f"block {block}, {kind}: {number(value)}" if block is not None else f"{kind}: {number(value)}"
            )
        )
        axes.add_patch(cell)
        if small:
            axes.text(x, y, shown(value), ha="center", va="center", fontsize=8.2, color=ink["ink"])
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(kinds)), [label_of(kind) for kind in kinds], rotation=30, ha="right")
    step = max(1, len(rows) // 40)
    axes.set_yticks(range(0, len(rows), step), ["" if row is None else str(row) for row in rows[::step]])
    axes.set_ylabel("block")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def label_of(kind: str) -> str:
    """The name of a kind as it fits into a plot; of layers restored as one, those with a weight that was rounded."""
    parts = kind.split(" + ")
    names = [part.rpartition(".")[2] for part in parts if len(parts) == 1 or "norm" not in part]
    said = "+".join(name.removesuffix("_proj") for name in names)
    said = f"experts.{said}" if "experts." in kind else said
    return short(said, 20)


def _strengths(cells: Mapping[Place, float], log: bool) -> dict[Place, float]:
    """Opacity of each cell, 0.06 to 0.95."""
    scaled = {k: math.log10(max(v, 1e-12)) if log else v for k, v in cells.items()}
    low, high = min(scaled.values()), max(scaled.values())
    low = max(low, high - 6) if log else 0.0  # an error of zero must not take all of the scale
    width = high - low or 1.0
    return {k: 0.06 + 0.89 * min(1.0, max(0.0, (v - low) / width)) for k, v in scaled.items()}


def _experts(studio: Studio, each: Checkpoint, label: str) -> list[Plot]:
    """Tokens per expert, of a mixture."""
    found = [one for one in each.manifest.experts or () if one.get("tokens")]
    if not found:
        return []
    least = min(min(one["tokens"]) for one in found)
    unseen = sum(int(one.get("unseen") or 0) for one in found)
    caption = (
        f"{label}Calibration tokens that came to each expert, one row per layer, stronger for more. The least used "
        "expert saw "
        f"{least:,}; {unseen or 'none'} saw no token at all."
    )
    height = max(2.2, 0.16 * len(found) + 1.2)
    draw = partial(_tokens, found=found)
    return [studio.plot("tokens per expert", draw, caption, "tokens per expert and layer", height)]


def _tokens(axes: Axes, ink: Ink, found: list[dict[str, Any]]) -> None:
    """An image in one colour of the theme would be fixed, so it is orange in both."""
    width = max(len(one["tokens"]) for one in found)
    most = max(max(one["tokens"]) for one in found) or 1
    image = [
        [
            (0.85, 0.45, 0.17, 0.05 + 0.95 * n / most)
            for n in (*one["tokens"], *[0] * (width - len(one["tokens"])))
        ]
        for one in found
    ]
    axes.imshow(image, aspect="auto", interpolation="none")
    axes.set_xlabel("expert")
    places = [position(str(one.get("name", ""))) for one in found]
    step = max(1, len(found) // 16)
    names = [str(row if where is None or where[0] is None else where[0]) for row, where in enumerate(places)]
    axes.set_yticks(range(0, len(found), step), names[::step])
    axes.set_ylabel("block")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _table(each: Checkpoint, label: str) -> Table:
    """Layers of a checkpoint; experts of one block and kind are one row."""
    groups: dict[tuple[Place | None, str | None, str | None], list[LayerRecord]] = {}
    for layer in each.manifest.layers:
        groups.setdefault((position(layer.name), layer.scheme, layer.algorithm), []).append(layer)
    rows = []
    for (where, scheme, algorithm), found in groups.items():
        block, kind = where or (None, found[0].name)
        errors = [e for e in map(_error, found) if e is not None]
        weights = [e.weight_error for e in found if e.weight_error is not None]
        worst = [e.worst_row_error for e in found if e.worst_row_error is not None]
        fallbacks = [said for one in found for said in one.fallbacks or ()]
        many = f" ({len(found)})" if len(found) > 1 else ""
        rows.append(
            [
                Cell("" if block is None else str(block), block), text(kind + many), text(scheme), text(algorithm),
                figure(fmean(errors) if errors else None), figure(max(worst, default=None)),
                figure(fmean(weights) if weights else None), text("; ".join(fallbacks) or None, bool(fallbacks)),
            ]
        )  # fmt: skip
    columns = [
        Column("block", True), Column("kind"), Column("scheme"), Column("algorithm"),
        Column("output error", True, "what the algorithm minimised, over its value with all weights zero"),
        Column("worst row", True, "the same of the worst output"),
        Column("weight error", True, "squared error over squared weight"), Column("fallbacks"),
    ]  # fmt: skip
    return Table(f"{label}Quantized layers", columns, rows, open=len(rows) <= 16)
