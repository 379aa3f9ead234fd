"""What a run cost, what it warns of, and how to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import yaml

from quantkit.checkpoint.records import REFUSED, BlockFacts, RunFacts
from quantkit.report.parts import (
    Column,
    Listing,
    Plot,
    Section,
    Table,
    figure,
    number,
    seconds,
    short,
    size,
    text,
)
from quantkit.report.results import Checkpoint, Results
from quantkit.report.style import Ink, Studio

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def cost(results: Results, studio: Studio) -> Section | None:
    """Time and memory, or None where no run is known."""
    plots: list[Plot] = []
    tables = []
    several = len(results.checkpoints) > 1
    for each in results.checkpoints:
        facts = each.facts
        if facts is None or not facts.seconds:
            continue
        label = f"{each.name}: " if several else ""
        phases = {name: value for name, value in facts.seconds.items() if name != "total"}
        plots.append(
            studio.plot(
                "time by phase",
                partial(_phases, phases=phases),
                f"{label}{seconds(facts.seconds.get('total'))} in all, {size(facts.peak_rss_bytes)} of memory at "
                "the most. "
                "Phases do not overlap; the rest is start-up.",
                "bars of the seconds of each phase",
                height=max(1.9, 0.33 * len(phases) + 0.9),
            )
        )
        if facts.blocks:
            plots.append(
                studio.plot(
                    "time and memory by block",
                    partial(_blocks, blocks=facts.blocks),
                    f"{label}Seconds of each block (bars) and the memory in use behind it (line).",
                    "bars of the seconds and a line of the memory of each block",
                )
            )
            tables.append(_block_table(facts, label))
    for sweep in results.sweeps:
        by_step: dict[str, float] = {}
        for cell in sweep.cells:
            for step, taken in (cell.seconds or {}).items():
                if step != "total":
                    by_step[step] = by_step.get(step, 0.0) + taken
        if by_step:
            draw = partial(_phases, phases=by_step)
            caption = (
                "Seconds of each step, added up over all recipes. Recipes that share weights count their "
                "quantization once "
                "each, though it ran once."
            )
            plots.append(studio.plot("time of the sweep", draw, caption, "bars of seconds", height=2.2))
    if not plots:
        return None
    return Section("cost", "Time and memory", "What it took to make these files.", plots, tables)


def _phases(axes: Axes, ink: Ink, phases: dict[str, float]) -> None:
    names = sorted(phases, key=lambda name: -phases[name])
    axes.barh(range(len(names)), [phases[n] for n in names], color=ink["c1"], alpha=0.85, height=0.65)
    for y, name in enumerate(names):
        axes.annotate(
            seconds(phases[name]),
            (phases[name], y),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.16)
    axes.set_xlabel("seconds")


def _blocks(axes: Axes, ink: Ink, blocks: Sequence[BlockFacts]) -> None:
    places = range(len(blocks))
    axes.bar(places, [b.seconds for b in blocks], color=ink["c1"], alpha=0.8, width=0.7)
    step = max(1, len(blocks) // 12)
    names = [b.name.rpartition(".")[2] if b.name[-1:].isdigit() else "rest" for b in blocks]
    axes.set_xticks(list(places)[::step], [short(name, 8) for name in names[::step]])
    axes.set_xlabel("block")
    axes.set_ylabel("seconds")
    memory = [b.rss_bytes for b in blocks]
    if all(m is not None for m in memory):
        other = axes.twinx()
        other.plot(
            places,
            [(m or 0) / 1e9 for m in memory],
            color=ink["c2"],
            marker="o",
            markersize=3.5,
            linewidth=1.4,
        )
        other.set_ylim(bottom=0)
        other.set_ylabel("memory (GB)", color=ink["c2"])
        other.spines["right"].set_visible(True)


def _block_table(facts: RunFacts, label: str) -> Table:
    columns = [
        Column("block"), Column("time", True), Column("CPU time", True), Column("memory", True, "in use behind it"),
        Column("peak so far", True),
    ]  # fmt: skip
    rows = [
        [
            text(b.name), figure(b.seconds, seconds(b.seconds)), figure(b.cpu_seconds, seconds(b.cpu_seconds)),
            figure(b.rss_bytes, size(b.rss_bytes)), figure(b.peak_rss_bytes, size(b.peak_rss_bytes)),
        ]
        for b in facts.blocks or ()
    ]  # fmt: skip
    return Table(f"{label}Blocks", columns, rows, open=False)


def warnings(results: Results) -> Section | None:
    """Notes and fallbacks of all results; one that several recipes have is listed once."""
    found: dict[str, list[str]] = {}
    for each in results.checkpoints:
        for note in each.manifest.notes:
            found.setdefault(note, []).append(each.name)
        for layer in each.manifest.layers:
            for said in layer.fallbacks or ():
                found.setdefault(f"{layer.name}: {said}", []).append(each.name)
    for bench in results.benches:
        for model in bench.models:
            if model.reason:
                found.setdefault(f"{model.way or 'another way'}: {model.reason}", []).append(model.name)
    for sweep in results.sweeps:
        for cell in sweep.cells:
            if cell.status != "finished":
                found[f"{cell.id}: {cell.status}" + (f", {cell.reason}" if cell.reason else "")] = []
            for note in cell.notes or ():
                found.setdefault(note, []).append(cell.id)
    if not found:
        return None
    lead = "What the runs said on the way: fallbacks, what a loader refuses, recipes that could not run."
    several = len(results.points) > 1
    folded = [note for note in found if several and note.startswith(REFUSED)]
    shown = [_noted(note, found[note], several) for note in found if note not in folded]
    refused = "\n\n".join(_noted(note, found[note], several) for note in folded)
    listings = (
        [Listing(f"What engines refuse, and what they run instead ({len(folded)})", refused, True)]
        if folded
        else []
    )
    return Section("warnings", "Warnings and fallbacks", lead, notes=shown, listings=listings)


def _noted(note: str, names: list[str], several: bool) -> str:
    """A note and whose it is, where that is a question."""
    if not several or not names:
        return note
    rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{note} ({', '.join(names[:2])}{rest})"


def reproduction(results: Results) -> Section:
    """Recipes, commands and digests."""
    listings, tables = [], []
    for each in results.checkpoints:
        listings.append(Listing(f"Recipe of {each.name}", _recipe(each)))
        tables.append(_hashes(each))
    for sweep in results.sweeps:
        facts = {"host": sweep.host, "versions": sweep.versions, "threads": sweep.threads, "date": sweep.date}
        rows = [
            [text("model"), text(sweep.model)],
            [text("sha256 of the model's files"), text(sweep.model_digest)],
        ]
        rows += [[text(key), text(_flat(value))] for key, value in facts.items() if value]
        tables.append(Table(f"Sweep {sweep.name}", [Column("what"), Column("value")], rows))
        listings += [Listing(f"Recipe of {c.id}", _yaml(c.recipe)) for c in sweep.cells if c.recipe]
    rows = [[text(s.name), text(s.schema), text(s.sha256)] for s in results.sources]
    columns = [Column("file"), Column("schema"), Column("sha256")]
    tables.append(Table("Files this page was drawn from", columns, rows))
    lead = (
        "On one machine with one number of threads, the same recipe, model, texts and code give the same bytes. Every "
        "default is written out in the recipes below."
    )
    return Section("reproduce", "Reproduce it", lead, tables=tables, listings=listings)


def _recipe(each: Checkpoint) -> str:
    name = each.manifest.model.name if each.manifest.model else "MODEL"
    front = f"# quantkit quantize this.yaml --model {name}\n"
    return front.replace("\r", " ") + _yaml(each.manifest.recipe or {})


def _yaml(value: dict[str, Any]) -> str:
    shown: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return shown


def _hashes(each: Checkpoint) -> Table:
    manifest, facts = each.manifest, each.facts
    identity = manifest.identity
    rows: list[tuple[str, object]] = [
        ("model", manifest.model.name if manifest.model else None),
        ("sha256 of the model's files", identity.get("model")),
        ("sha256 of the calibration tokens", identity.get("data")),
        ("quantkit", manifest.code.quantkit if manifest.code else identity.get("code")),
        ("sha256 of quantkit's sources", manifest.code.source if manifest.code else None),
        ("device", identity.get("device")),
    ]
    for source in manifest.calibration.sources if manifest.calibration else ():
        rows.append((f"sha256 of {source.get('name')}", source.get("sha256")))
    if manifest.evaluation:
        rows.append((f"sha256 of {', '.join(manifest.evaluation.text)}", manifest.evaluation.text_sha256))
    if facts:
        rows += [
            ("date", facts.date), ("host", _flat(facts.host)), ("versions", _flat(facts.versions)),
            ("threads", None if facts.threads is None else number(facts.threads)),
        ]  # fmt: skip
    shards = [(name, entry.sha256) for name, entry in manifest.files.items() if name.endswith(".safetensors")]
    rows += [(f"sha256 of {name}", digest) for name, digest in sorted(shards)]
    cells = [[text(name), text(value)] for name, value in rows if value is not None]
    return Table(f"What made {each.name}", [Column("what"), Column("value")], cells, open=False)


def _flat(value: object) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return None if value is None else str(value)
