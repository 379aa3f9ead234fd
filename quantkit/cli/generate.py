"""`quantkit generate`: stream a continuation, then say how fast it was."""

from __future__ import annotations

import click

from quantkit.cli.opening import backend_option, compute_option, device_option, dtype_option, open_model


@click.command("generate")
@click.argument("model")
@click.option("--prompt", required=True, metavar="TEXT")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 keeps all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@backend_option
@compute_option
@device_option
@dtype_option
def command(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    backend: str,
    compute: str,
    device: str,
    dtype: str,
) -> None:
    """Continue a prompt with MODEL (a folder or hub id), token by token.

    On the CPU a family that the native path knows runs in it, whole steps in one call; on CUDA steps after the prompt
    are replays of a graph. Others run in transformers.
    """
    from quantkit_eval import generate_stream

    from quantkit.runtime import GraphDecoder, graphed, native

    opened, tokenizer = open_model(model, device, dtype, backend, compute)
    if opened.device.type == "cpu":
        runner = native(opened, compute)
    else:
        runner = graphed(opened, max_new_tokens)
    how = "in a CUDA graph" if isinstance(runner, GraphDecoder) else "native"
    if isinstance(runner, str):
        click.echo(f"in transformers: {runner}", err=True)
        runner, how = opened, "in transformers"
    done = generate_stream(
        runner,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        write=lambda text: click.echo(text, nl=False),
    )
    click.echo()
    if isinstance(runner, GraphDecoder) and runner.why_eager:  # the warning said why
        how = "in transformers"
    decode = done.decode_tokens_per_second
    speed = f"{decode:.1f} tokens/s" if decode else "nothing to time"
    click.echo(
        f"prompt: {done.prompt_tokens} tokens, {done.prompt_tokens_per_second:.1f} tokens/s; "
        f"decode {how}: {done.new_tokens} tokens, {speed}",
        err=True,
    )
