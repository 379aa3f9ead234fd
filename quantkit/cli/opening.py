"""MODEL on the command line -> a loaded model and its tokenizer, saying where and in which dtype it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.terminal import say
from quantkit.models.headers import resolve_model

if TYPE_CHECKING:
    from quantkit.runtime import Runner

device_option = click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:n]")
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: the checkpoint's on CUDA, float32 on CPU.",
)
backend_option = click.option(
    "--backend",
    default="auto",
    show_default=True,
    help="Kernels of packed linears; `quantkit kernels` lists them.",
)
verify_option = click.option(
    "--verify", is_flag=True, help="Compare the sha256 of every file with quantkit.json first."
)
compute_option = click.option(
    "--compute",
    type=click.Choice(["float", "int8", "int8-token"]),
    default="float",
    show_default=True,
    help="Activations in the native CPU kernels: as they are, or rounded per token and group, or per token.",
)

kv_cache_option = click.option(
    "--kv-cache",
    metavar="NAME",
    help="Run with this KV cache: exact, INT8, INT4, KIVI4, KIVI2 or, with stored scales, FP8. Default: its own.",
)


def _use_threads(_context: click.Context, _option: click.Parameter, threads: int | None) -> None:
    """torch's setting, which the native kernels follow. Known before torch starts, it holds for every runtime."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)


threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 4096),
    metavar="N",
    callback=_use_threads,
    expose_value=False,
    help="CPU threads. Default: the cores this process may use, bounded by a container's CPU quota.",
)


def opening_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a verb that opens a model: `backend`, `compute`, `verify`, `device`, `dtype`, and --threads."""
    stack = (backend_option, compute_option, verify_option, device_option, dtype_option, threads_option)
    for option in reversed(stack):
        command = option(command)
    return command


def resolve(path_or_id: str) -> Path:
    """The folder of a model named on the command line."""
    return resolve_model(path_or_id, Path(path_or_id))


def open_model(
    path_or_id: str,
    device: str,
    dtype: str,
    backend: str = "auto",
    compute: str = "float",
    verify: bool = False,
    kv_cache: str | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) through quantkit's loader, packed or not."""
    import torch

    from quantkit.checkpoint.load import load
    from quantkit.layers.kv_cache import cache_of
    from quantkit.models.tokenizer import open_tokenizer

    path = resolve(path_or_id)
    model = load(
        path,
        device=device,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        backend=backend,
        compute=compute,
        verify=verify,
        kv_cache=kv_cache,
    )
    cache = cache_of(model)
    held = f", {cache().description}" if cache else ""
    say(f"{path_or_id}: {str(model.dtype).removeprefix('torch.')} on {model.device}{held}", err=True)
    return model, open_tokenizer(path)


@dataclass(frozen=True)
class Opening:
    """How a model is opened: the values of `opening_options` and of `kv_cache_option`."""

    device: str
    dtype: str
    backend: str = "auto"
    compute: str = "float"
    verify: bool = False
    kv_cache: str | None = None

    def open(self, path_or_id: str) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        return open_model(
            path_or_id, self.device, self.dtype, self.backend, self.compute, self.verify, self.kv_cache
        )

    def run(self, path_or_id: str, new_tokens: int, run_in: str) -> tuple[Any, Any, Runner]:
        """(model, tokenizer, what runs it token by token); run_in: auto, native or transformers."""
        from quantkit.runtime import choose_runner

        model, tokenizer = self.open(path_or_id)
        runner = choose_runner(model, new_tokens, "eager" if run_in == "transformers" else run_in)
        if runner.reason:
            say(f"{path_or_id}: in transformers: {runner.reason}", err=True)
        return model, tokenizer, runner

    def exact(self, same: bool) -> Opening:
        """That of the model to compare with: an exact cache; other than for the same weights, its own kernels."""
        if same:
            return Opening(self.device, self.dtype, self.backend, self.compute, self.verify, "exact")
        return Opening(self.device, self.dtype, verify=self.verify, kv_cache="exact")
