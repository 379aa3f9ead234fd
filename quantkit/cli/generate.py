"""`quantkit generate`: print the continuation of a prompt as it is generated, then how fast that was."""

from __future__ import annotations

import click

from quantkit.cli.opening import kv_cache_option, open_model, opening_options
from quantkit.cli.terminal import say


@click.command("generate")
@click.argument("model")
@click.option("--prompt", required=True, metavar="TEXT")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 keeps all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@kv_cache_option
@opening_options
def command(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    kv_cache: str | None,
    backend: str,
    compute: str,
    verify: bool,
    device: str,
    dtype: str,
) -> None:
    """Continue a prompt with MODEL (a folder or hub id), token by token.

    On the CPU, a model family that the native path knows runs in it, a whole step per call. On CUDA, the steps after
    the prompt are replays of a graph. Other models run in transformers.
    """
    from quantkit_eval import generate_stream

    from quantkit.runtime import choose_runner

    opened, tokenizer = open_model(model, device, dtype, backend, compute, verify, kv_cache)
    runner = choose_runner(opened, max_new_tokens)
    if runner.reason:
        say(f"in transformers: {runner.reason}", err=True)
    done = generate_stream(
        runner.model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        write=lambda text: say(text, nl=False),
    )
    say()
    how = {"native": "native", "graph": "in a CUDA graph", "eager": "in transformers"}[runner.ran]
    decode = done.decode_tokens_per_second
    speed = f"{decode:.1f} tokens/s" if decode else "nothing to time"
    say(
        f"prompt: {done.prompt_tokens} tokens, {done.prompt_tokens_per_second:.1f} tokens/s; "
        f"decode {how}: {done.new_tokens} tokens, {speed}",
        err=True,
    )
