"""`quantkit inspect`: what a checkpoint holds, layer by layer, and who can load it."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table

from quantkit.cli.opening import device_option, dtype_option, resolve
from quantkit.cli.output import json_option, make_console, size, write_report
from quantkit.device import find_device


@click.command("inspect")
@click.argument("model")
@device_option
@dtype_option
@json_option
def command(model: str, device: str, dtype: str, json_file: str | None) -> None:
    """Show what MODEL (a folder or hub id) holds per layer; no model is built.

    Device and dtype are those it would run in; they decide the memory its weights take.
    """
    from quantkit.checkpoint.inspect import inspect_checkpoint

    report = inspect_checkpoint(resolve(model))
    print_inspection(report, make_console())
    click.echo(_memory(report, device, dtype))
    write_report(json_file, report)


def print_inspection(report: dict[str, Any], console: Console) -> None:
    """The table of a `quantkit-inspect/1` report."""
    table = Table(
        Column("layer", overflow="fold"),
        "shape",
        "scheme",
        "bits/weight",
        "size",
        "scales",
        "error",
        title=report["path"],
    )
    for column in table.columns[3:]:
        column.justify = "right"
    for layer in report["layers"]:
        scales = layer["scale_range"]
        error = layer["error"]
        table.add_row(
            layer["name"],
            " x ".join(map(str, layer["shape"])),
            layer["scheme"] or layer["dtype"],
            f"{layer['bits_per_weight']:.3f}",
            size(layer["bytes"]),
            f"{scales[0]:.2e} .. {scales[1]:.2e}" if scales else "",
            "" if error is None else f"{error:.2e}",
        )
    console.print(table)
    totals = report["totals"]
    console.print(
        f"{totals['quantized_layers']} quantized layers, {size(totals['bytes'])} of tensors, "
        f"{totals['model_bits_per_weight']:.3f} bits per weight",
        highlight=False,
    )
    for loader in report["loaders"]:
        console.print(
            f"{'yes' if loader['loads'] else 'no ':<3}  {loader['name']}: {loader['how']}",
            markup=False,
            highlight=False,
        )


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
