"""A prompt's text continued, piece by piece, with the prompt and the decoding steps timed apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantkit_eval.detokenizer import Detokenizer
from quantkit_eval.loop import end_tokens, generate_tokens
from quantkit_eval.protocols import CausalLM, Tokenizer
from quantkit_eval.sampler import Sampling
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
) -> Generation:
    """Continue `prompt`; `write` gets each piece of text as soon as its characters are whole.

    temperature, top_k, top_p and seed: see `sampler.Sampling`. Stops at the end tokens of the generation config,
    else of the tokenizer. EvalError for options out of range, and for a prompt that is empty, too long
    or not valid text.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    ids = tokenize(tokenizer, prompt, special=True)
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
