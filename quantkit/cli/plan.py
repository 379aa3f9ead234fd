"""`quantkit plan`: what a recipe makes of a model, before a weight is read: sizes, memory, cache, and the roofline."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.table import Column, Table

from quantkit import assets
from quantkit.cli.output import Screen, deliver, json_option, make_console, size
from quantkit.cli.terminal import say
from quantkit.cli.validate import print_engines, print_prediction
from quantkit.cost.hardware import Hardware, find_hardware
from quantkit.cost.kernels import Kernel, kernels_of
from quantkit.cost.model import find_model
from quantkit.cost.rates import known_rates
from quantkit.cost.roofline import Bound, bounds, decode, prefill, seconds
from quantkit.cost.time import duration
from quantkit.errors import RunError, UserError
from quantkit.models.headers import Headers
from quantkit.plan import Plan
from quantkit.predict.sizes import Prediction, parts_of
from quantkit.preflight.check import verdicts
from quantkit.validation import Validated, subject_of, validate

SCHEMA = "quantkit-plan/1"
MEASURE = "quantkit.bench.rates"
MOST_ASKED = 4000  # linears up to which every engine is asked about them


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
@click.option(
    "--time/--no-time", "timed", default=True, show_default=True, help="Predict how long a run takes here."
)
@click.option("--measure", is_flag=True, help="Measure this machine again first, about half a minute.")
@json_option
def command(
    recipe: str,
    model: str | None,
    names: tuple[str, ...],
    context: int,
    batch: int,
    overrides: tuple[str, ...],
    timed: bool,
    measure: bool,
    json_file: str | None,
) -> None:
    """Predict the size, memory, time and speed limits of a model quantized by RECIPE; no weight is read.

    Time is that of the run on this machine, whose speed is measured once, in half a minute, and kept.

    The roofline bounds from below the time of each operator: for a prompt of --context tokens, and for one more token
    per sequence, the last of --context.
    """
    collecting = gc.isenabled()
    gc.disable()  # the command ends soon, and makes a few objects for each of what may be thousands of tensors
    try:
        report, prediction = _planned(recipe, model, names, context, batch, overrides, timed, measure)
        deliver(json_file, report, lambda: print_report(report, prediction, make_console()))
    finally:
        if collecting:
            gc.enable()


def _planned(
    recipe: str,
    model: str | None,
    names: tuple[str, ...],
    context: int,
    batch: int,
    overrides: tuple[str, ...],
    timed: bool,
    measure: bool,
) -> tuple[dict[str, Any], Prediction]:
    """The whole report, and what it says of memory and disk."""
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
    report["budget"] = _budget(found)
    if timed or measure:
        report["time"] = _duration(found, measure)
    report["engines"] = [{"runs": runs, "said": said} for runs, said in _engines(found)]
    report["target"] = found.outlook or None
    report["notes"] += [*notes, *([found.search] if found.search else [])]
    return report, found.prediction


def _devices(names: Sequence[str]) -> tuple[list[Hardware], list[str]]:
    """The named devices; without names this machine, or a note that it was not measured."""
    if names:
        return [find_hardware(name) for name in dict.fromkeys(names)], []
    try:
        return [find_hardware("auto")], []
    except UserError as error:
        return [], [f"no roofline: {error}"]


def _duration(found: Validated, again: bool) -> dict[str, Any]:
    """How long the run will take here; this machine is measured first if it was not, or if it is to be done again."""
    assert found.plan is not None
    assert found.headers is not None
    rates = None if again else known_rates()
    if rates is None:
        say("measuring this machine, about half a minute ...", err=True)
        done = subprocess.run([sys.executable, "-m", MEASURE], capture_output=True, text=True)
        rates = known_rates()
        if done.returncode or rates is None:
            said = (done.stderr.strip().splitlines() or ["nothing was kept"])[-1]
            raise RunError(f"this machine could not be measured: {said}; plan without it by --no-time")
    return duration(found.recipe, found.plan, found.headers, rates, found.ways).report(rates)


def _engines(found: Validated) -> list[tuple[bool, str]]:
    """What each engine would refuse, where the recipe names no target; nothing for thousands of linears."""
    plan = found.plan
    if plan is None or found.headers is None or found.recipe.target or len(plan.layers) > MOST_ASKED:
        return []
    return verdicts(subject_of(plan, found.headers))


def _budget(found: Validated) -> dict[str, Any] | None:
    """The recipe's budget in bytes, and how the run works within it."""
    if found.recipe.budget is None:
        return None
    return {"limits": found.recipe.budget.model_dump(exclude_none=True), "ways": asdict(found.ways)}


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
        "kernels": kernels_of(model.linears if model.head is None else (*model.linears, model.head)),
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
    if time := report.get("time"):
        console.print(_told(time), soft_wrap=True)
    if budget := report.get("budget"):
        console.print(_within(budget), soft_wrap=True)
    _print_kernels(report["kernels"], console)
    print_engines([(each["runs"], each["said"]) for each in report.get("engines", ())], console)
    if report.get("target"):
        console.print(report["target"], soft_wrap=True)
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


def _told(time: Mapping[str, Any]) -> str:
    """The time of a run in one line."""
    phases = {name: seconds for name, seconds in time["phases"].items() if name != "evaluate"}
    told = ", ".join(f"{name} {long_time(seconds)}" for name, seconds in phases.items())
    line = f"time on this machine ({time['threads']} threads): about {long_time(time['total'])} ({told})"
    evaluation = time["phases"].get("evaluate")
    return line if evaluation is None else f"{line}; and about {long_time(evaluation)} to evaluate"


def _within(budget: Mapping[str, Any]) -> str:
    """A budget, and what it costs, in one line."""
    limits = ", ".join(f"{key} {size(value)}" for key, value in budget["limits"].items())
    ways, how = budget["ways"], []
    if ways["spilled"]:
        how.append("hidden states lie on disk")
    if ways["kept"] is not None:
        how.append(f"a block keeps {size(ways['kept'])} of its inputs")
    return f"budget: {limits}: {' and '.join(how) or 'the run works as without it'}"


def _print_kernels(kernels: Sequence[Mapping[str, Any]], console: Screen) -> None:
    """Which kernel runs each kind of layer, alike ones in one line."""
    found: dict[tuple[str, ...], list[str]] = {}
    for one in kernels:
        chosen = tuple(f"{each['device']}: {Kernel(**each)}" for each in one["kernels"])
        found.setdefault(chosen, []).append(one["name"])
    for chosen, names in found.items():
        console.print(f"kernels of {', '.join(names)}: {'; '.join(chosen)}", soft_wrap=True)


def long_time(seconds: float) -> str:
    """5.25 -> "5.2 s"; 5000 -> "1 h 23 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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
