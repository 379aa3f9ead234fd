"""`quantkit plan`: what a recipe makes of a model, before a weight is read: sizes, memory, cache, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.table import Column, Table

from quantkit import assets
from quantkit.cli.output import Screen, deliver, json_option, make_console, size
from quantkit.cli.validate import print_prediction
from quantkit.cost.hardware import Hardware, find_hardware
from quantkit.cost.model import find_model
from quantkit.cost.roofline import Bound, bounds, decode, prefill, seconds
from quantkit.errors import UserError
from quantkit.models.headers import Headers
from quantkit.plan import Plan
from quantkit.predict import Prediction, parts_of
from quantkit.validation import validate

SCHEMA = "quantkit-plan/1"


@click.command("plan")
@click.argument("recipe")
@click.option(
    "--model", metavar="PATH", help="Folder of the model; default: the recipe's, or the embedded one."
)
@click.option(
    "--hardware",
    "names",
    metavar="NAME|auto",
    multiple=True,
    help="Device of the roofline; repeatable; auto, the default: this machine, once it has been measured.",
)
@click.option("--context", type=click.IntRange(1), default=4096, show_default=True, metavar="N")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a key: weights.bits=3.")
@json_option
def command(
    recipe: str,
    model: str | None,
    names: tuple[str, ...],
    context: int,
    batch: int,
    overrides: tuple[str, ...],
    json_file: str | None,
) -> None:
    """Predict the size, memory and speed limits of a model quantized by RECIPE; no weight is read.

    The roofline bounds from below the time of each operator: for a prompt of --context tokens, and for one more token
    per sequence, the last of --context.
    """
    devices, notes = _devices(names)
    found = validate(recipe, model, overrides, engines=False)
    if found.plan is None:
        named = found.recipe.model or str(assets.default_model())
        found = validate(recipe, named, overrides, engines=False)
    assert found.plan is not None
    assert found.headers is not None
    assert found.prediction is not None
    report = plan_report(found.plan, found.headers, devices, context, batch)
    report["prediction"] = asdict(found.prediction)
    report["notes"] += [*notes, *([found.search] if found.search else [])]
    prediction = found.prediction
    deliver(json_file, report, lambda: print_report(report, prediction, make_console()))


def _devices(names: Sequence[str]) -> tuple[list[Hardware], list[str]]:
    """The named devices; without names this machine, or a note that it was not measured."""
    if names:
        return [find_hardware(name) for name in dict.fromkeys(names)], []
    try:
        return [find_hardware("auto")], []
    except UserError as error:
        return [], [f"no roofline: {error}"]


def plan_report(
    plan: Plan, headers: Headers, devices: Sequence[Hardware], context: int, batch: int
) -> dict[str, Any]:
    """The report of schema `quantkit-plan/1`, without the prediction of memory and disk. Sizes in bytes."""
    model, parts = find_model(plan, headers), parts_of(plan, headers)
    steps = {"prefill": prefill(context, batch), "decode": decode(context, batch)}
    return {
        "schema": SCHEMA,
        "context": context,
        "batch": batch,
        "parts": [part.report() for part in parts],
        "kv_cache": {
            "scheme": None if plan.kv is None else str(plan.kv),
            "bytes": model.cache_bytes(context, batch),
        },
        "roofline": [
            {"hardware": device.report()}
            | {name: _step(bounds(model, step, device), step.tokens) for name, step in steps.items()}
            for device in devices
        ],
        "notes": list(model.notes),
    }


def _step(found: list[Bound], tokens: int) -> dict[str, Any]:
    """A forward that computes `tokens` tokens, operator by operator."""
    least = seconds(found)
    return {
        "operators": [bound.report() for bound in found],
        "seconds": least,
        "tokens_per_s": tokens / least,
    }


def print_report(report: dict[str, Any], prediction: Prediction, console: Screen) -> None:
    """Sizes by kind of layer, what the run needs, the cache, then two tables per device."""
    console.print(_sizes(report["parts"]))
    print_prediction(prediction, console)
    context, batch, cache = report["context"], report["batch"], report["kv_cache"]
    sequences = f"{batch} sequence{'s' * (batch > 1)} of {context} tokens"
    console.print(f"KV cache, {cache['scheme'] or '16 bits'}: {size(cache['bytes'])} for {sequences}")
    needed = prediction.tensors + cache["bytes"]
    for device in report["roofline"]:
        hardware = device["hardware"]
        for name in ("prefill", "decode"):
            console.print(_operators(f"{name} on {hardware['title']}", device[name]))
            rate, least = device[name]["tokens_per_s"], _time(device[name]["seconds"])
            console.print(f"{name}, {sequences}: at most {rate:,.1f} tokens/s, at least {least}")
        if hardware["memory"] is not None:
            held = "fit" if needed <= hardware["memory"] else "do not fit"
            console.print(
                f"weights and cache, {size(needed)}, {held} in its memory of {size(hardware['memory'])}",
                soft_wrap=True,
            )
    for note in report["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _sizes(parts: Sequence[dict[str, Any]]) -> Table:
    """Bytes and bits per weight of each kind of layer, and of all."""
    table = Table("kind", *(Column(name, justify="right") for name in ("tensors", "size", "bits/weight")))
    for part in parts:
        bits = f"{part['bits_per_weight']:.3f}"
        table.add_row(part["kind"], str(part["tensors"]), size(part["bytes"]), bits)
    tensors, weights, n_bytes = (sum(part[key] for part in parts) for key in ("tensors", "weights", "bytes"))
    table.add_row("all", str(tensors), size(n_bytes), f"{8 * n_bytes / weights:.3f}")
    return table


def _operators(title: str, step: dict[str, Any]) -> Table:
    """One line per operator; operations, bytes and time are those of all its instances."""
    right = ("count", "operations", "bytes", "ops/byte")
    table = Table(
        Column("operator", overflow="fold"),
        *(Column(name, justify="right") for name in right),
        "in",
        "bound by",
        Column("time", justify="right"),
        Column("share", justify="right"),
        title=title,
    )
    for one in step["operators"]:
        count, intensity = one["count"], one["intensity"]
        table.add_row(
            one["name"],
            str(count),
            f"{count * one['operations']:.3g}",
            size(count * one["bytes"]),
            "" if intensity is None else f"{intensity:.3g}",
            one["kind"],
            one["bound"],
            _time(one["seconds"]),
            f"{one['seconds'] / step['seconds']:.1%}",
        )
    return table


def _time(value: float) -> str:
    """0.00123 -> "1.23 ms"."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.2f} {unit}"
    return f"{value * 1e6:.1f} us"
