"""MODEL on the command line -> a loaded model and its tokenizer, saying where and in which dtype it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.errors import ModelError, UserError
from quantkit.models.headers import resolve_model

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")

device_option = click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:n]")
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", *DTYPES]),
    default="auto",
    show_default=True,
    help="auto: the checkpoint's on CUDA, float32 on CPU.",
)


def resolve(path_or_id: str) -> Path:
    """The folder of a model named on the command line."""
    return resolve_model(path_or_id, Path(path_or_id))


def pick_device(name: str) -> torch.device:
    """The device `name` says; "auto" is CUDA where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is no device; use auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return device


def pick_dtype(name: str, device: torch.device, path: Path) -> torch.dtype:
    """The dtype `name` says; "auto" is the checkpoint's on CUDA and float32 elsewhere."""
    import torch
    from transformers import AutoConfig

    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return AutoConfig.from_pretrained(path).dtype or torch.float32


def open_model(path_or_id: str, device: str, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) through quantkit's loader, packed or not."""
    from transformers import AutoTokenizer

    from quantkit.checkpoint.load import load

    path = resolve(path_or_id)
    where = pick_device(device)
    kind = pick_dtype(dtype, where, path)
    click.echo(f"{path_or_id}: {kind} on {where}", err=True)
    model = load(path, device=where, dtype=kind)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no usable tokenizer beside the model: {error}") from None
    return model, tokenizer
