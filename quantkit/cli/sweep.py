"""`quantkit sweep`: a grid of recipes on one model, one table, and which of them are really better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.table import Column, Table

from quantkit import assets
from quantkit.cli.evaluation import plus_minus
from quantkit.cli.opening import device_option, threads_option
from quantkit.cli.output import Screen, deliver, json_option, make_console, page_option, size
from quantkit.cli.terminal import say
from quantkit.errors import UserError
from quantkit.models.headers import read_checkpoint, resolve_model
from quantkit.sweep.grid import Sweep, of_command_line
from quantkit.sweep.share import in_order, plan_cells


@click.command("sweep")
@click.argument("sweep", required=False)
@click.option("--model", metavar="PATH_OR_ID", help="Folder or hub id[@revision]; default: the sweep's.")
@click.option(
    "--methods", metavar="LIST", help="rtn,gptq,awq+gptq: instead of a file, with the lists that follow."
)
@click.option("--bits", metavar="LIST", help="8,4,3,2")
@click.option("--groups", metavar="LIST", help="Group sizes: 128,64,channel")
@click.option("--inputs", metavar="LIST", help="none,int8: how the inputs of linears are rounded.")
@click.option("--kv", metavar="LIST", help="none,INT8,FP8: KV caches.")
@click.option("--output", metavar="DIR", help="Default: ./out/<model>-<name of the sweep>.")
@device_option
@click.option("--keep", is_flag=True, help="Leave the checkpoints of the cells in DIR/work.")
@click.option("--separate", is_flag=True, help="Quantize every cell for itself, as separate runs would.")
@click.option(
    "--statistics",
    multiple=True,
    metavar="DIR",
    help="Keep statistics of the original model here for other sweeps, or use finished ones; several are added up.",
)
@click.option("--dry-run", is_flag=True, help="List the cells and what they share, and do nothing.")
@click.option(
    "--better", nargs=2, multiple=True, metavar="A B", help="Say whether cell A is better than B; repeatable."
)
@page_option
@threads_option
@json_option
def command(
    sweep: str | None,
    model: str | None,
    methods: str | None,
    bits: str | None,
    groups: str | None,
    inputs: str | None,
    kv: str | None,
    output: str | None,
    device: str,
    keep: bool,
    separate: bool,
    statistics: tuple[str, ...],
    dry_run: bool,
    better: tuple[tuple[str, str], ...],
    page_file: str | None,
    json_file: str | None,
) -> None:
    """Try many recipes on one model, those of the file SWEEP or of the lists, and compare them in one table.

    Finished cells are kept: the same command goes on where it was stopped.
    """
    lists = {"bits": bits, "group_size": groups, "inputs": inputs, "kv_cache": kv}
    asked = of_command_line(sweep, methods, lists, model)
    _known(asked, better)
    if dry_run:
        _list(asked, model, not separate)
        return
    from quantkit.sweep.run import sweep as make

    result = make(
        asked,
        model,
        output,
        device=device,
        keep=keep,
        share=not separate,
        isolated=True,
        statistics=statistics,
        page=page_file,
        told=lambda line: say(line, err=True),
    )
    deliver(json_file, result, lambda: print_sweep(result, better, make_console()))


def _known(asked: Sweep, better: Sequence[tuple[str, str]]) -> None:
    """UserError for a cell that the sweep does not have."""
    names = [cell.id for cell in asked.cells]
    for name in (each for pair in better for each in pair):
        if name not in names:
            raise UserError(f"--better: no cell is called {name!r}; there are {', '.join(names)}")


def _list(asked: Sweep, model: str | None, share: bool) -> None:
    """The cells, their size and whose weights they run; from headers alone."""
    path = resolve_model(model or asked.asked.model, assets.default_model())
    table = Table("cell", "algorithm", "scheme", Column("size", justify="right"), "KV cache", "weights")
    planned = in_order(plan_cells(asked.cells, read_checkpoint(path), share))
    for each in planned:
        schemes = sorted({str(layer.scheme) for layer in each.plan.layers}) or ["as they are"]
        names = [one.name for one in each.cell.recipe.transforms]
        weights = each.cell.recipe.weights
        method = " + ".join([*names, *([weights.algorithm.name] if weights else [])])
        cache = "exact" if each.plan.kv is None else str(each.plan.kv)
        source = f"those of {each.source}" if each.shares else "quantized"
        table.add_row(each.cell.id, method, ", ".join(schemes), size(each.n_bytes), cache, source)
    console = make_console()
    console.print(table)
    own = sum(not each.shares for each in planned)
    console.print(f"{len(planned)} cells, {own} quantizations")


def print_sweep(result: Mapping[str, Any], better: Sequence[tuple[str, str]], console: Screen) -> None:
    """The table, best KL first within a size, the fronts, and the answers."""
    from quantkit.sweep.table import decided

    console.print(_table(result))
    evaluation = result["evaluation"]
    if evaluation is not None:
        console.print(
            f"evaluated on {evaluation['tokens']:,} tokens in windows of {evaluation['context']}; original perplexity "
            f"{evaluation['original']['perplexity']:.4f}; ± is one standard error, over windows; * nothing is both "
            f"smaller and closer to the original; memory: with the KV cache of {result['context']:,} tokens; "
            "x: times the original's tokens/s, run in turn with it",
            soft_wrap=True,
        )
    for axis, names in result["pareto"].items():
        if names:  # without speeds there is no front of them
            console.print(f"Pareto front, {axis} against KL: {', '.join(names)}", soft_wrap=True)
    for cell in result["cells"]:
        if cell["status"] != "finished":
            console.print(f"{cell['id']}: {cell['status']}: {cell['reason']}", soft_wrap=True)
    pairs = [*better] or _neighbours(result)
    for a, b in pairs:
        if (pair := decided(result, a, b)) is not None:
            console.print(answer(pair, result["decisions"]), soft_wrap=True)
    seconds = result["seconds"]
    console.print(
        f"time: {seconds['call']:.0f} s now, {seconds['cells']:.0f} s for all cells; separate runs would take about "
        f"{seconds['separate']:.0f} s (estimated; --separate measures it)",
        soft_wrap=True,
    )


def answer(pair: Mapping[str, Any], decisions: Mapping[str, Any]) -> str:
    """Whether a cell is better than another, as a sentence."""
    error = "" if pair["se"] is None else f" ± {pair['se']:.5f}"
    said = f"is {pair['a']} better than {pair['b']}? {pair['better']}: "
    said += f"KL {pair['difference']:+.5f}{error} per token, p {pair['p_corrected']:.2g}"
    return f"{said} (Holm, {decisions['comparisons']} comparisons)"


def _neighbours(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each cell of the front of sizes and the best one of those that it has beaten: not larger, next in KL."""
    finished = [cell for cell in result["cells"] if cell["status"] == "finished"]
    found = []
    for name in result["pareto"]["size"]:
        own = next(cell for cell in finished if cell["id"] == name)
        alike = [
            cell
            for cell in finished
            if cell["id"] != name and cell["size"]["quantized_bytes"] == own["size"]["quantized_bytes"]
        ]
        if alike:
            found.append((name, min(alike, key=lambda cell: cell["evaluation"]["kl_mean"])["id"]))
    return found


def _table(result: Mapping[str, Any]) -> Table:
    right: tuple[str, ...] = (
        "size",
        "bits",
        "memory",
        "perplexity",
        "NLL difference",
        "KL mean",
        "KL p99",
        "top-1",
    )
    right += ("decode/s", "prefill/s", "peak", "time")
    table = Table(Column("cell", overflow="fold"), *(Column(name, justify="right") for name in right))
    fronts = {name for axis in ("size", "memory") for name in result["pareto"][axis]}
    finished = [cell for cell in result["cells"] if cell["status"] == "finished"]
    for cell in sorted(
        finished, key=lambda one: (one["size"]["quantized_bytes"], one["evaluation"]["kl_mean"])
    ):
        found, speed = cell["evaluation"], cell["speed"] or {}
        table.add_row(
            cell["id"] + (" *" if cell["id"] in fronts else ""),
            size(cell["size"]["quantized_bytes"]),
            f"{cell['size']['linear_bits_per_weight']:.2f}",
            size(cell["memory_bytes"]),
            plus_minus(found["quantized"]["perplexity"], found["quantized"]["perplexity_se"], 3),
            plus_minus(found["delta_nll"], found["delta_nll_se"], 4),
            plus_minus(found["kl_mean"], found["kl_mean_se"], 5),
            f"{found['kl_p99']:.3g}",
            f"{found['top1_agreement']:.2%}",
            *(_fast(speed, key) if speed else "" for key in ("decode", "prefill")),
            size(cell["peak_rss_bytes"] or 0),
            f"{cell['seconds']['quantize']:.1f} s",
        )
    return table


def _fast(speed: Mapping[str, Any], phase: str) -> str:
    """Tokens per second, and how many times as many as the original's in the same minute."""
    return f"{speed[f'{phase}_tokens_per_s']:,.0f} ({speed[f'{phase}_times_original']:.1f}x)"
