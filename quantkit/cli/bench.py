"""`quantkit bench`: time models, or matrix products, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from click.core import ParameterSource

from quantkit.cli.opening import (
    backend_option,
    compute_option,
    dtype_option,
    kv_cache_option,
    resolve,
    threads_option,
    verify_option,
)
from quantkit.cli.output import deliver, json_option, make_console, write_report
from quantkit.cli.terminal import say

PRODUCT_ROUNDS, MODEL_ROUNDS = 7, 5
OF_PRODUCTS = ("shapes", "tokens", "ops")
OF_BOTH = ("model", "products", "rounds", "threads", "device", "json_file")


def _listed(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> list[str]:
    """ "1,4" and a second --m 16 -> ["1", "4", "16"]."""
    return [part for value in values for part in value.split(",") if part]


def _numbers(
    context: click.Context, option: click.Parameter, values: tuple[str, ...], least: int
) -> list[int]:
    listed = _listed(context, option, values)
    what = {"tokens": "number of tokens", "batches": "batch", "contexts": "context"}[str(option.name)]
    kind = "a positive integer" if least else "an integer of 0 or more"
    for part in listed:
        if not (part.isascii() and part.isdecimal()) or len(part) > 9 or int(part) < least:
            raise click.BadParameter(f"{what} must be {kind}, got {part!r}")
    return list(dict.fromkeys(map(int, listed)))


def _counts(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> list[int]:
    return _numbers(context, option, values, 1)


def _lengths(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> list[int]:
    return _numbers(context, option, values, 0)


@click.command("bench")
@click.argument("model", required=False)
@click.option(
    "--against",
    multiple=True,
    metavar="MODEL",
    help="Another model to run in between, as it is; repeatable. MODEL itself, too: then without its options.",
)
@click.option("--prompt", type=click.IntRange(1), help="Tokens of a prompt. Default: 512, or what fits.")
@click.option("--new", type=click.IntRange(1), default=64, show_default=True, help="Tokens decoded after it.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    callback=_counts,
    metavar="B,...",
    help="Sequences that decode together. Default: 1.",
)
@click.option(
    "--context",
    "contexts",
    multiple=True,
    callback=_lengths,
    metavar="N,...",
    help="Tokens that are in the cache before the prompt. Default: 0.",
)
@click.option(
    "--way",
    type=click.Choice(["auto", "native", "graph", "eager"]),
    default="auto",
    show_default=True,
    help="How the model runs; auto: as `quantkit generate` would.",
)
@click.option(
    "--no-memory", is_flag=True, help="Leave out peak memory, for which every model is loaded again."
)
@click.option(
    "--products",
    is_flag=True,
    help="Instead of a model, matrix products of packed weights: each op against PyTorch's.",
)
@click.option(
    "--shapes",
    multiple=True,
    callback=_listed,
    metavar="NAME|NxK,...",
    help="Of --products: 1.1b, llama-3-8b, or a weight's own shape such as 4096x11008. Default: both models.",
)
@click.option(
    "--m",
    "tokens",
    multiple=True,
    callback=_counts,
    metavar="M,...",
    help="Of --products: tokens. Default: 1 to 4096.",
)
@click.option(
    "--ops",
    multiple=True,
    callback=_listed,
    metavar="TEXT,...",
    help="Of --products: only ops named like this.",
)
@click.option(
    "--rounds", type=click.IntRange(1), help=f"Default: {MODEL_ROUNDS}, of --products {PRODUCT_ROUNDS}."
)
@kv_cache_option
@backend_option
@compute_option
@verify_option
@dtype_option
@threads_option
@click.option("--device", metavar="auto|cpu|cuda[:n]", help="Default: auto, of --products cpu.")
@json_option
def command(model: str | None, products: bool, json_file: str | None, **options: Any) -> None:
    """Time MODEL (a folder or hub id) on this machine: prompt, decoding, memory, share of the roofline.

    Times mean something only while nothing else runs. All models run in this process, interleaved; numbers are medians
    over rounds, after a warm-up, with their noise.
    """
    _refuse_others(products)
    if products and model:
        raise click.UsageError("--products times no model; leave MODEL out")
    if products:
        _products(json_file, **options)
    elif model is None:
        raise click.UsageError("nothing to time was chosen; name a MODEL or add --products")
    else:
        _models(model, json_file, **options)


def _refuse_others(products: bool) -> None:
    """UsageError for options that were given and belong to the other kind of measurement."""
    context = click.get_current_context()
    given = [
        each.opts[0]
        for each in context.command.params
        if context.get_parameter_source(str(each.name)) is not ParameterSource.DEFAULT
        and each.name not in OF_BOTH
        and (each.name in OF_PRODUCTS) != products
    ]
    if given:
        kind = "--products" if products else "a model"
        raise click.UsageError(f"{' and '.join(given)} cannot be combined with {kind}; leave it out")


def _products(
    json_file: str | None,
    shapes: list[str],
    tokens: list[int],
    ops: list[str],
    rounds: int | None,
    device: str | None,
    **_: Any,  # of models, which have their defaults
) -> None:
    """The table of matrix products."""
    import torch

    from quantkit.bench.kernels import table as bench

    if device not in (None, "cpu", "cuda"):
        raise click.BadParameter(f"--products runs on cpu or cuda, got {device!r}", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("no CUDA device here; leave --device out to time the CPU")
    try:
        bench.shapes(shapes)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--shapes") from error
    bench.run(
        shapes or tuple(bench.SHAPES),
        tokens or bench.TOKENS,
        device or "cpu",
        ops,
        rounds or PRODUCT_ROUNDS,
        write=say,
        save=lambda report: write_report(json_file, report),
    )


def _models(
    model: str,
    json_file: str | None,
    against: Sequence[str],
    prompt: int | None,
    new: int,
    batches: list[int],
    contexts: list[int],
    rounds: int | None,
    no_memory: bool,
    device: str | None,
    dtype: str,
    verify: bool,
    **chosen: Any,
) -> None:
    """Whole models."""
    from quantkit.bench.models import generation
    from quantkit.bench.models.footprint import footprint
    from quantkit.bench.models.subject import Opening, Subject, open_subjects, prompt_length

    own: dict[str, Any] = {name: chosen[name] for name in ("backend", "compute", "kv_cache", "way")}
    shared: dict[str, Any] = {"device": device or "auto", "dtype": dtype, "verify": verify}
    openings = [Opening(str(resolve(model)), **shared, **own)]
    openings += [Opening(str(resolve(other)), **shared) for other in against]
    subjects = open_subjects(openings)
    batches, contexts = batches or [1], contexts or [0]
    length = prompt_length(subjects, prompt, new, contexts)
    plan = generation.Plan(length, new, tuple(batches), tuple(contexts), rounds or MODEL_ROUNDS)

    def memory(subject: Subject) -> dict[str, Any] | None:
        if no_memory:
            return None
        return footprint(subject.opening, max(batches), max(contexts), length, new)

    report = generation.run(subjects, plan, lambda text: say(text, err=True), memory)
    deliver(json_file, report, lambda: _draw(report))


def _draw(report: dict[str, Any]) -> None:
    from quantkit.cli.bench_table import print_models

    print_models(report, make_console())
