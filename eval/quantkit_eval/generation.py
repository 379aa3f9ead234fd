"""Generation token by token, with prompt and decoding timed apart."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quantkit_eval.detokenizer import Detokenizer
from quantkit_eval.errors import EvalError
from quantkit_eval.model import check_vocabulary, device_of, inference, longest_context
from quantkit_eval.sampler import pick


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
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = 0,
    write: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt`; `write` gets each piece of text as soon as its characters are whole.

    temperature 0 is greedy; top_k 0 and top_p 1 leave every token in. Stops at the end tokens of the generation
    config, else of the tokenizer. Draws from a generator of its own (seed None: a new one each time); the global
    random state is not touched. EvalError for options out of range, an empty prompt, and one that does not fit.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    _check_fit(model, ids, max_new_tokens)
    random = torch.Generator()
    random.seed() if seed is None else random.manual_seed(seed)
    ends = _end_tokens(model, tokenizer)
    kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def step(tokens: list[int], cache: Any) -> tuple[int, Any, float]:
        start = time.perf_counter()
        out = model(
            input_ids=torch.tensor([tokens], device=device_of(model)),
            past_key_values=cache,
            use_cache=True,
            **kept,
        )
        token = pick(out.logits[0, -1], temperature, top_k, top_p, random)  # waits for the device
        if out.past_key_values is None:
            raise EvalError("the model returns no key-value cache; it cannot be run token by token")
        return token, out.past_key_values, time.perf_counter() - start

    pieces: list[str] = []

    def tell(piece: str) -> None:
        pieces.append(piece)
        if piece and write:
            write(piece)

    text = Detokenizer(tokenizer, ids)
    with inference(model):
        token, cache, prompt_seconds = step(ids, None)
        new = steps = 0
        decode_seconds = 0.0
        while token not in ends:
            new += 1
            tell(text.push(token))
            if new == max_new_tokens:
                break
            token, cache, seconds = step([token], cache)
            steps += 1
            decode_seconds += seconds
    tell(text.finish())
    return Generation("".join(pieces), len(ids), new, steps, prompt_seconds, decode_seconds)


def _check(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    for name, value, right, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not right:
            raise EvalError(f"{name} must be {wanted}, got {value}")


def _check_fit(model: Any, ids: list[int], max_new_tokens: int) -> None:
    if not ids:
        raise EvalError("the prompt has no tokens; give some text")
    check_vocabulary(model, ids)
    most = longest_context(model)
    if most and len(ids) + max_new_tokens > most:
        raise EvalError(
            f"{len(ids)} tokens of prompt and {max_new_tokens} new ones are more than the model's {most}; shorten "
            "the prompt or lower max_new_tokens"
        )


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)
