"""A prompt's text continued, piece by piece, prompt and decoding steps timed apart; and several at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from quantkit_eval.detokenizer import Detokenizer
from quantkit_eval.loop import end_tokens, generate_tokens
from quantkit_eval.protocols import CausalLM, Tokenizer
from quantkit_eval.sampler import Sampling, seeds
from quantkit_eval.together import Batch, check_prompts, decode_together
from quantkit_eval.windows import tokenize


@dataclass(frozen=True)
class Generation:
    """text: the continuation, without the end token. The prompt pass gives the first token, `decode_steps` the rest.

    Seconds are those of the model and of picking, not of turning tokens into text.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    decode_steps: int
    prompt_seconds: float
    decode_seconds: float

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """None when nothing was decoded after the first token."""
        return self.decode_steps / self.decode_seconds if self.decode_steps else None


def generate_stream(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = 0,
    write: Callable[[str], None] | None = None,
    special: bool = True,
) -> Generation:
    """Continue `prompt`; `write` gets each piece of text as soon as its characters are whole.

    special: whether the tokenizer adds its special tokens, which the text of a chat template holds already.
    temperature, top_k, top_p and seed: see `sampler.Sampling`. Stops at the end tokens of the generation config,
    else of the tokenizer. EvalError for options out of range, and for a prompt that is empty, too long
    or not valid text.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    ids = tokenize(tokenizer, prompt, special)
    ends = end_tokens(model, tokenizer)
    text, pieces, seconds = Detokenizer(tokenizer, ids), list[str](), list[float]()

    def tell(piece: str) -> None:
        pieces.append(piece)
        if piece and write:
            write(piece)

    new = 0
    for token in generate_tokens(model, ids, max_new_tokens, sampling, ends):
        seconds.append(token.seconds)
        if token.id not in ends:
            new += 1
            tell(text.push(token.id))
    tell(text.finish())
    return Generation("".join(pieces), len(ids), new, len(seconds) - 1, seconds[0], sum(seconds[1:]))


@dataclass(frozen=True)
class BatchGeneration:
    """Texts of several prompts continued together, without end tokens; tokens and seconds are those of all."""

    texts: list[str]
    prompt_tokens: int
    new_tokens: int
    decode_tokens: int
    prompt_seconds: float
    decode_seconds: float

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """None when nothing was decoded after the first tokens."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else None


def generate_batch(
    model: CausalLM,
    batch: Batch,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = 0,
    special: bool = True,
) -> BatchGeneration:
    """Continue prompts together in `batch`, which runs `model`; prompt i draws with seed + i (`seeds`).

    Options and errors as in `generate_stream`.
    """
    choosers = [Sampling(temperature, top_k, top_p, one).chooser() for one in seeds(seed, len(prompts))]
    ids = [tokenize(tokenizer, prompt, special) for prompt in prompts]
    check_prompts(model, ids, max_new_tokens)
    ends = end_tokens(model, tokenizer)
    new: list[list[int]] = [[] for _ in prompts]
    seconds, counts = list[float](), list[int]()
    for each in decode_together(batch, ids, max_new_tokens, choosers, ends):
        seconds.append(each.seconds)
        counts.append(len(each.tokens))
        for number, token in each.tokens.items():
            new[number].append(token)
    return BatchGeneration(
        [_text(tokenizer, prompt, made, ends) for prompt, made in zip(ids, new, strict=True)],
        sum(map(len, ids)),
        sum(token not in ends for made in new for token in made),
        sum(counts[1:]),
        seconds[0],
        sum(seconds[1:]),
    )


def _text(tokenizer: Tokenizer, prompt: list[int], made: list[int], ends: Collection[int]) -> str:
    """The text behind a prompt, as `generate_stream` gives it."""
    text = Detokenizer(tokenizer, prompt)
    return "".join([*(text.push(token) for token in made if token not in ends), text.finish()])
