"""`write_page`: results -> sections -> one HTML file that needs no network, and its plots as PNG if they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from quantkit import __version__
from quantkit.errors import UserError
from quantkit.files import output_error, write_atomically
from quantkit.paths import user_path
from quantkit.report.explained import explained
from quantkit.report.layers import layers
from quantkit.report.parts import Card, Section, number, plus_minus, seconds, share, size
from quantkit.report.quality import KL, SIZE, front, quality
from quantkit.report.read import read_results
from quantkit.report.results import Checkpoint, Results, Sweep
from quantkit.report.run import cost, reproduction, warnings
from quantkit.report.speed import speed
from quantkit.report.style import Studio

ENOUGH = 0.01  # nats of mean KL under which a sweep's card looks for the smallest configuration


def write_page(
    paths: Sequence[str | Path], output: str | Path, png: str | Path | None = None, title: str | None = None
) -> list[Path]:
    """Write the page about these results, atomically, and return what was written.

    paths: checkpoint folders and JSON files (docs/report.md). png: a folder for the plots as PNG files; it is made.
    UserError for results that cannot be read, OutputError where the disk refuses.
    """
    results = read_results(paths)
    studio = Studio({} if png is not None else None)
    text = page(results, studio, title)
    file = user_path(output, UserError)
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"{output} must be a file in a folder that exists; give -o another name")
    write_atomically(file, iter([text.encode()]))
    written = [file]
    if png is not None:
        folder = user_path(png, UserError)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(folder, error) from error
        for name, data in (studio.pngs or {}).items():
            write_atomically(folder / name, iter([data]))
            written.append(folder / name)
    return written


def page(results: Results, studio: Studio, title: str | None = None) -> str:
    """The whole HTML document. Everything that comes from the results is escaped."""
    import jinja2
    from markupsafe import Markup

    here = files("quantkit.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    shown = template.render(
        title=title or _title(results),
        headline=_headline(results),
        cards=_cards(results),
        sections=_sections(results, studio),
        css=Markup((here / "page.css").read_text(encoding="utf-8")),
        js=Markup((here / "page.js").read_text(encoding="utf-8")),
        markup=Markup,
        version=__version__,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        number=number,
        share=share,
    )
    return shown.encode(errors="replace").decode()


def _sections(results: Results, studio: Studio) -> list[Section]:
    made = (
        quality(results, studio),
        speed(results, studio),
        explained(results, studio),
        layers(results, studio),
        cost(results, studio),
        warnings(results),
        reproduction(results),
    )
    return [each for each in made if each is not None]


def _title(results: Results) -> str:
    names = [f"{s.name}: {s.model}" for s in results.sweeps] + [c.name for c in results.checkpoints]
    names = names or [e.name for e in results.evaluations] or [s.name for s in results.sources]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _headline(results: Results) -> str:
    """The result in a sentence."""
    if results.sweeps:
        sweep = results.sweeps[0]
        done = sum(cell.status == "finished" for cell in sweep.cells)
        return f"{done} recipes of {len(sweep.cells)} measured on {sweep.model}, every one on the same text."
    if len(results.checkpoints) == 1:
        one = results.checkpoints[0]
        sizes, report = one.manifest.size, results.evaluation_of(one)
        said = f"{sizes.quantized_bytes / sizes.original_bytes:.0%} of the original's size"
        if report and report.top1_agreement is not None:
            agreed = share(report.top1_agreement)
            said += f"; it agrees with the original on the likeliest next token for {agreed} of the text"
        return f"{said}."
    return ""


def _cards(results: Results) -> list[Card]:
    if results.sweeps:
        return _sweep_cards(results, results.sweeps[0])
    if results.checkpoints:
        return (
            _checkpoint_cards(results, results.checkpoints[0])
            if len(results.checkpoints) == 1
            else _many(results)
        )
    found = []
    for each in results.evaluations[:4]:
        fit = each.report.quantized
        found.append(
            Card(f"{each.name}: perplexity", number(fit.perplexity, 4), f"± {number(fit.perplexity_se, 2)}")
        )
    return found + _speed_cards(results)


def _checkpoint_cards(results: Results, one: Checkpoint) -> list[Card]:
    sizes, report, facts = one.manifest.size, results.evaluation_of(one), one.facts
    cards = [Card("Size", size(sizes.quantized_bytes), f"of {size(sizes.original_bytes)}")]
    if sizes.linear_bits_per_weight:
        whole = f"{sizes.model_bits_per_weight:.2f} over the whole model"
        cards.append(
            Card("Bits per weight", f"{sizes.linear_bits_per_weight:.3f}", f"quantized layers; {whole}")
        )
    if report:
        fit, base = report.quantized, report.original
        was = f"original {number(base.perplexity, 4)}; " if base else ""
        delta = (
            f"Δ NLL {plus_minus(report.delta_nll, report.delta_nll_se)}"
            if report.delta_nll is not None
            else ""
        )
        cards.append(Card("Perplexity", number(fit.perplexity, 4), was + delta))
    if report and report.kl_mean is not None:
        error = number(report.kl_mean_se, 2)
        cards.append(
            Card("KL, mean", number(report.kl_mean), f"± {error} nats; p99 {number(report.kl_p99, 2)}")
        )
        cards.append(Card("Same top token", share(report.top1_agreement), f"of {report.tokens:,} tokens"))
    if facts and "total" in facts.seconds:
        cards.append(
            Card("Time", seconds(facts.seconds["total"]), f"peak memory {size(facts.peak_rss_bytes)}")
        )
    return cards + _speed_cards(results)


def _speed_cards(results: Results) -> list[Card]:
    """Decoding of the first model that was benchmarked."""
    for bench in results.benches:
        for model in bench.models:
            for row in model.rows:
                if row.decode:
                    found = row.decode
                    part = f", {found.roofline_share:.0%} of the roofline" if found.roofline_share else ""
                    return [
                        Card("Decode", f"{number(found.tokens_per_s.median)} tok/s", f"{model.name}{part}")
                    ]
    return []


def _many(results: Results) -> list[Card]:
    points = [p for p in results.points if p.evaluation and p.evaluation.kl_mean is not None]
    cards = [
        Card("Checkpoints", str(len(results.checkpoints)), f"{len(points)} compared with their original")
    ]
    return cards + _extremes(results) + _speed_cards(results)


def _sweep_cards(results: Results, sweep: Sweep) -> list[Card]:
    done = [cell for cell in sweep.cells if cell.status == "finished"]
    cards = [Card("Recipes", str(len(done)), f"of {len(sweep.cells)}, on {sweep.model}")]
    if "cells" in sweep.seconds:
        apart = sweep.seconds.get("separate")
        detail = "" if apart is None else f"separate runs: about {seconds(apart)}"
        cards.append(Card("Time", seconds(sweep.seconds["cells"]), detail))
    return cards + _extremes(results) + _speed_cards(results)


def _extremes(results: Results) -> list[Card]:
    """The best configuration, the smallest good one, and how many are on the front."""
    points = [p for p in results.points if p.evaluation and p.evaluation.kl_mean is not None]
    if len(points) < 2:
        return []
    best = min(points, key=lambda p: KL.of(p) or 0.0)
    cards = [
        Card("Closest to the original", f"KL {number(KL.of(best))}", f"{best.name}, {size(best.n_bytes)}")
    ]
    good = [p for p in points if (KL.of(p) or 0.0) <= ENOUGH and p.n_bytes]
    if good:
        small = min(good, key=lambda p: p.n_bytes or 0)
        cards.append(Card(f"Smallest with KL up to {ENOUGH:g}", size(small.n_bytes), small.name))
    return [*cards, Card("On the Pareto front", str(len(front(points, SIZE, KL))), "KL against size")]
