"""`quantkit eval --explain`: the worst tokens, and what each layer costs on the windows that hold them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import click
from rich.table import Column, Table

from quantkit.cli.opening import resolve
from quantkit.cli.output import Screen
from quantkit.cli.progress import make_progress
from quantkit.device import launch

if TYPE_CHECKING:
    from quantkit_eval.attribution import Seen
    from quantkit_eval.explanation import Explanation

_UNITS = 10  # that the terminal shows; the JSON report has all


class Explaining:
    """One explanation that was asked for. UsageError where there can be none."""

    def __init__(self, model: str, baseline: str | None) -> None:
        if baseline is None:
            raise click.UsageError("--explain compares with the original; add --baseline")
        if launch().size > 1:
            raise click.UsageError("--explain runs in one process; start it without torchrun")
        self.model = model

    @cached_property
    def seen(self) -> Seen:
        """What the evaluation has to fill."""
        from quantkit_eval.attribution import Seen

        return Seen()

    def explained(self, model: Any, original: Any, tokenizer: Any) -> Explanation:
        """The explanation of what was seen."""
        from quantkit_eval.attribution import explain

        from quantkit.checkpoint.plugin import packed_linears
        from quantkit.checkpoint.restore import restorations
        from quantkit.layers.kv_cache import cache_of

        units, by = None, None
        if packed_linears(model):
            units, by = restorations(resolve(self.model), model, original)
        progress = make_progress()

        def told(done: int, total: int) -> None:
            progress.phase("restoring layers", done / total)

        try:
            return explain(
                model, original, tokenizer, self.seen, units, by, cache=cache_of(model), progress=told
            )
        finally:
            progress.finish()


def print_explanation(found: Explanation, console: Screen) -> None:
    """The worst tokens, then what the KL on their windows falls by when a unit is restored."""
    columns = (Column("KL", justify="right"), "text", "followed by", "baseline expected", "model expected")
    table = Table(*columns, "layer", title="tokens with the largest KL (nats)")
    for each in found.worst:
        expected = (f"{g.text!r} {g.probability:.0%}" for g in (each.baseline[0], each.model[0]))
        unit = each.unit or ""
        table.add_row(f"{each.kl:.3f}", f"…{each.before[-40:]!r}", repr(each.text), *expected, unit)
    console.print(table)
    if found.kl_mean is None:
        return
    table = Table(f"restored {found.by or 'part'}", Column("KL", justify="right"), Column("less by"))
    table.add_row("none", f"{found.kl_mean:.5f}", "")
    for one in found.restored[:_UNITS]:
        table.add_row(
            one.unit, f"{one.kl_mean:.5f}", f"{one.removed:.5f} ({one.removed / found.kl_mean:.1%})"
        )
    table.add_row("all", f"{found.kl_all_restored:.5f}", "")
    console.print(table)
    console.print(f"mean KL on the windows of the worst tokens: {', '.join(map(str, found.windows))}")
