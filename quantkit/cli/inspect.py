"""`quantkit inspect`: what a checkpoint holds, layer by layer, and who can load it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import click
from rich.table import Column, Table

from quantkit.cli.opening import device_option, dtype_option, resolve, verify_option
from quantkit.cli.output import Screen, deliver, json_option, make_console, size
from quantkit.device import find_device
from quantkit.errors import ModelError
from quantkit.preflight.subject import Finding
from quantkit.preflight.target import parse_target

_NUMBER = re.compile(r"(?:^|(?<=\.))[0-9]{1,9}(?=\.|$)")  # a part of a dotted name that is a number


@click.command("inspect")
@click.argument("model")
@click.option(
    "--all", "every_layer", is_flag=True, help="A line per layer instead of a line per kind of layer."
)
@click.option(
    "--target",
    metavar="engine=NAME[,tensor_parallel=N][,gpu=KIND]",
    help="Whether this engine would load and run it; exit code 2 if not.",
)
@verify_option
@device_option
@dtype_option
@json_option
def command(
    model: str,
    every_layer: bool,
    target: str | None,
    verify: bool,
    device: str,
    dtype: str,
    json_file: str | None,
) -> None:
    """Show what MODEL (a folder or hub id) holds per kind of layer; no model is built.

    Layers that differ only in the numbers of their names share a line. Device and dtype are those the model would run
    in; they decide the memory its weights take.
    """
    from quantkit.checkpoint.inspect import inspect_checkpoint

    asked = None if target is None else parse_target(target)
    report = inspect_checkpoint(resolve(model), verify, asked)
    memory = _memory(report, device, dtype)

    def draw() -> None:
        console = make_console()
        print_inspection(report, console, every_layer)
        console.print(memory)

    deliver(json_file, report, draw)
    if asked is not None:
        findings = [Finding(**each) for each in report["target"]["findings"]]
        if findings:
            raise ModelError("\n".join(f"{asked}: {each}" for each in findings))
        make_console().print(report["target"]["outlook"])


def print_inspection(report: dict[str, Any], console: Screen, every_layer: bool = False) -> None:
    """The table of a `quantkit-inspect/1` report, its totals, and who can load the checkpoint."""
    from quantkit.checkpoint.records import SearchRecord, parse

    layers = report["layers"]
    console.print(_table(report["path"], [[layer] for layer in layers] if every_layer else kinds(layers)))
    totals = report["totals"]
    console.print(
        f"{totals['quantized_layers']} quantized layers, {size(totals['bytes'])} of tensors, "
        f"{totals['model_bits_per_weight']:.3f} bits per weight"
    )
    if report["made_by"]:
        console.print(f"made by {report['made_by']}")
    if report["kv_cache"]:
        engine = report["kv_cache"]["engine"]
        in_vllm = f"in vLLM: {engine}" if engine else "vLLM has no such cache"
        console.print(f"KV cache: {report['kv_cache']['scheme']}; {in_vllm}")
    console.print(_checks(report["checks"]))
    for search in report["searches"]:
        console.print(str(parse(SearchRecord, search)))
    for loader in report["loaders"]:
        console.print(f"{'yes' if loader['loads'] else 'no':<3}  {loader['name']}: {loader['how']}")
    for engine in report["engines"]:
        if not engine["runs"]:
            console.print(f"no   {engine['said']}", soft_wrap=True)


def _checks(checks: dict[str, Any]) -> str:
    """What was looked at, in words."""
    said = [f"checked: {checks['tensors']} scales, norms and biases are finite"]
    said.append("the weight files have their sizes" if checks["sizes"] else "no quantkit.json gives sizes")
    if checks["sizes"]:
        said.append("every sha256 matches" if checks["digests"] else "digests not compared (--verify)")
    if checks["changed"]:
        said.append(f"changed since they were written: {', '.join(checks['changed'])}")
    return "; ".join(said)


def kinds(layers: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Layers whose names differ only in numbers and that have the same shape and scheme, in order of appearance."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for layer in layers:
        key = (_NUMBER.sub("*", layer["name"]), tuple(layer["shape"]), layer["scheme"], layer["dtype"])
        found.setdefault(key, []).append(layer)
    return list(found.values())


def _table(title: str, groups: list[list[dict[str, Any]]]) -> Table:
    """One line per group of layers: bytes added up, ranges of scales and errors."""
    table = Table(
        Column("layer", overflow="fold"),
        "count",
        "shape",
        "scheme",
        "bits/weight",
        "size",
        "scales",
        "weight error",
        title=title,
    )
    for index in (1, 4, 5, 6, 7):
        table.columns[index].justify = "right"
    for group in groups:
        first = group[0]
        scales = [scale for layer in group if layer["scale_range"] for scale in layer["scale_range"]]
        errors = [layer["error"] for layer in group if layer["error"] is not None]
        table.add_row(
            _name([layer["name"] for layer in group]),
            str(len(group)),
            " x ".join(map(str, first["shape"])),
            first["scheme"] or first["dtype"],
            _range([layer["bits_per_weight"] for layer in group], ".3f"),
            size(sum(layer["bytes"] for layer in group)),
            _range(scales, ".2e"),
            _range(errors, ".2e"),
        )
    return table


def _name(names: list[str]) -> str:
    """["layers.0.up", "layers.1.up"] -> "layers.{0..1}.up"; several numbers in a name give several ranges."""
    slots: list[set[int]] = [
        set(map(int, column)) for column in zip(*map(_NUMBER.findall, names), strict=True)
    ]
    ranges = iter([_numbers(sorted(slot)) for slot in slots])
    return _NUMBER.sub(lambda _: next(ranges), names[0])


def _numbers(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0..2,5}"; [3] -> "3"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    shown = ",".join("..".join(map(str, run)) for run in runs)
    return shown if len(numbers) == 1 else f"{{{shown}}}"


def _range(values: list[float], digits: str) -> str:
    """The value, or "least .. greatest" where they differ as shown; empty without values."""
    if not values:
        return ""
    least, greatest = format(min(values), digits), format(max(values), digits)
    return least if least == greatest else f"{least} .. {greatest}"


def _memory(report: dict[str, Any], device: str, dtype: str) -> str:
    """What the weights take once loaded: the packed ones as stored, the others in the dtype they run in."""
    import torch

    where = find_device(device, present=False)
    totals = report["totals"]
    held = totals["bytes"] - totals["quantized_bytes"]
    if dtype == "auto" and where.type == "cpu":
        dtype = "float32"
    if dtype != "auto":
        held = (totals["weights"] - totals["quantized_weights"]) * getattr(torch, dtype).itemsize
    kind = "stored" if dtype == "auto" else dtype
    return f"weights in memory, {kind} on {where}: {size(totals['quantized_bytes'] + held)}"
