"""`quantkit bench`: time matrix products on this machine, ours against what is installed."""

from __future__ import annotations

import click

from quantkit.cli.opening import threads_option
from quantkit.cli.output import json_option, write_report
from quantkit.cli.terminal import say


def _listed(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> list[str]:
    """ "1,4" and a second --m 16 -> ["1", "4", "16"]."""
    return [part for value in values for part in value.split(",") if part]


def _tokens(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> list[int]:
    listed = _listed(context, option, values)
    for part in listed:
        if not (part.isascii() and part.isdecimal()) or len(part) > 9 or not int(part):
            raise click.BadParameter(f"number of tokens must be a positive integer, got {part!r}")
    return list(map(int, listed))


@click.command("bench")
@click.option(
    "--products",
    is_flag=True,
    help="Matrix products of packed weights: each op against PyTorch's, and its share of the roofline.",
)
@click.option(
    "--shapes",
    multiple=True,
    callback=_listed,
    metavar="NAME|NxK,...",
    help="1.1b, llama-3-8b, or a weight's own shape such as 4096x11008. Default: both models.",
)
@click.option(
    "--m", "tokens", multiple=True, callback=_tokens, metavar="M,...", help="Tokens. Default: 1 to 4096."
)
@click.option("--ops", multiple=True, callback=_listed, metavar="TEXT,...", help="Only ops named like this.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@threads_option
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@json_option
def command(
    products: bool,
    shapes: list[str],
    tokens: list[int],
    ops: list[str],
    rounds: int,
    device: str,
    json_file: str | None,
) -> None:
    """Time matrix products on this machine. Times mean something only while nothing else runs."""
    if not products:
        raise click.UsageError("nothing to time was chosen; add --products")
    import torch

    from quantkit.bench.kernels import table as bench

    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("no CUDA device here; leave --device out to time the CPU")
    try:
        bench.shapes(shapes)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--shapes") from error
    bench.run(
        shapes or tuple(bench.SHAPES),
        tokens or bench.TOKENS,
        device,
        ops,
        rounds,
        write=say,
        save=lambda report: write_report(json_file, report),
    )
