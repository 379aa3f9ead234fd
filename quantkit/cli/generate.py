"""`quantkit generate`: print the continuation of a prompt as it is generated, or of several, then how fast that was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.opening import kv_cache_option, open_model, opening_options
from quantkit.cli.terminal import say
from quantkit.errors import DataError
from quantkit.models.chat import chat_text

if TYPE_CHECKING:
    from quantkit_eval import BatchGeneration, Generation

    from quantkit.runtime import Runner

_HOW = {"native": "native", "graph": "in a CUDA graph", "eager": "in transformers"}
_LONGEST = 64_000_000  # bytes of a file with a prompt
_SHOWN = 60  # characters of a prompt in its heading


@click.command("generate")
@click.argument("model")
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Repeatable: several are continued together."
)
@click.option(
    "--prompt-file",
    "files",
    multiple=True,
    metavar="FILE",
    help="A UTF-8 file with one prompt, less its last line break; - is standard input; repeatable.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Each prompt is a user's message: render it with the tokenizer's chat template.",
)
@click.option("--system", metavar="TEXT", help="With --chat, the system message before it.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 keeps all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the first prompt; of the others, one more each.",
)
@kv_cache_option
@opening_options
def command(
    model: str,
    prompts: tuple[str, ...],
    files: tuple[str, ...],
    chat: bool,
    system: str | None,
    kv_cache: str | None,
    backend: str,
    compute: str,
    verify: bool,
    device: str,
    dtype: str,
    **options: Any,
) -> None:
    """Continue one or several prompts with MODEL (a folder or hub id), token by token.

    On the CPU, a model family that the native path knows runs in it, a whole step per call, of all prompts together. On
    CUDA, the steps after a single prompt are replays of a graph. Other models run in transformers.
    """
    if system is not None and not chat:
        raise click.UsageError("--system is a message of a chat; add --chat")
    texts = [*prompts, *map(_read, files)]
    if not texts:
        raise click.UsageError("there is no prompt; add --prompt TEXT or --prompt-file FILE")
    opened, tokenizer = open_model(model, device, dtype, backend, compute, verify, kv_cache)
    given = [chat_text(tokenizer, text, system) for text in texts] if chat else texts
    options |= {"special": not chat}
    if len(given) == 1:
        done, runner = _one(opened, tokenizer, given[0], options)
    else:
        done, runner = _several(opened, tokenizer, given, texts, options)
    decode = done.decode_tokens_per_second
    speed = f"{decode:.1f} tokens/s" if decode else "nothing to time"
    together = "" if len(given) == 1 else f" of {len(given)} prompts together"
    say(
        f"prompt: {done.prompt_tokens} tokens, {done.prompt_tokens_per_second:.1f} tokens/s; "
        f"decode{together} {_HOW[runner.ran]}: {done.new_tokens} tokens, {speed}",
        err=True,
    )


def _one(opened: Any, tokenizer: Any, prompt: str, options: dict[str, Any]) -> tuple[Generation, Runner]:
    """A single prompt, whose text is printed while it is generated."""
    from quantkit_eval import generate_stream

    from quantkit.runtime import choose_runner

    runner = choose_runner(opened, options["max_new_tokens"])
    _explain(runner)
    done = generate_stream(runner.model, tokenizer, prompt, write=lambda text: say(text, nl=False), **options)
    say()
    return done, runner


def _several(
    opened: Any, tokenizer: Any, given: list[str], texts: list[str], options: dict[str, Any]
) -> tuple[BatchGeneration, Runner]:
    """Prompts that are continued together; their texts are printed at the end, each under the prompt's first words."""
    from quantkit_eval import generate_batch

    from quantkit.runtime import choose_batch

    batch, runner = choose_batch(opened)
    _explain(runner)
    done = generate_batch(runner.model, batch, tokenizer, given, **options)
    for number, (prompt, text) in enumerate(zip(texts, done.texts, strict=True), 1):
        beginning = " ".join(prompt.split())
        cut = beginning if len(beginning) <= _SHOWN else f"{beginning[:_SHOWN]}..."
        say(f"[{number}] {cut}\n{text}\n")
    return done, runner


def _explain(runner: Runner) -> None:
    if runner.reason:
        say(f"in transformers: {runner.reason}", err=True)


def _read(name: str) -> str:
    """The prompt in a file; DataError if it cannot be read."""
    try:
        if name == "-":
            data = sys.stdin.buffer.read(_LONGEST + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(_LONGEST + 1)
        if len(data) > _LONGEST:
            raise DataError(f"{name}: a prompt has at most {_LONGEST:,} bytes; give a shorter one")
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the prompt in {name!r}: {error}") from None
    return text.removesuffix("\n").removesuffix("\r")
