"""The generation loop: a step function gives logits, a chooser picks a token, until an end token or the budget.

What a step runs is its own affair (a transformers model, a native decoder, a captured graph); everything that
generates, for text, for token ids or for a benchmark, runs this loop.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch

from quantkit_eval.decoding import CacheFactory, same_cache
from quantkit_eval.errors import EvalError
from quantkit_eval.model import check_vocabulary, device_of, inference, longest_context
from quantkit_eval.protocols import CausalLM, Tokenizer
from quantkit_eval.sampler import Sampling

Step = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]
"""(tokens int64 [1, M], state of the sequence or None) -> (logits [vocabulary] after the last token, new state)."""


class Token(NamedTuple):
    """A new token, and the seconds that the model and picking took; the first one's include the prompt."""

    id: int
    seconds: float


def decode(
    step: Step,
    prompt: torch.Tensor,
    max_new_tokens: int,
    choose: Callable[[torch.Tensor], int],
    ends: Collection[int] = (),
) -> Iterator[Token]:
    """New tokens after `prompt` [length], at most max_new_tokens; the last may be an end token, one of `ends`."""
    given, state = prompt[None], None
    for _ in range(max_new_tokens):
        start = time.perf_counter()
        logits, state = step(given, state)
        token = choose(logits)  # waits for the device
        yield Token(token, time.perf_counter() - start)
        if token in ends:
            return
        given = torch.tensor([[token]])


def model_step(model: CausalLM, make: CacheFactory | None = None) -> Step:
    """The step of a causal LM with a key-value cache of its own, or of `make`; no gradients, eval mode in the call."""
    kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    device = device_of(model)

    def step(tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        cache = make() if cache is None and make is not None else cache
        with inference(model):
            out = model(input_ids=tokens.to(device), past_key_values=cache, use_cache=True, **kept)
        if out.past_key_values is None:
            raise EvalError("the model returns no key-value cache; it cannot be run token by token")
        if make is not None:
            same_cache(out.past_key_values, cache)
        return out.logits[0, -1], out.past_key_values

    return step


def generate_tokens(
    model: CausalLM,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    ends: Collection[int],
) -> Iterator[Token]:
    """Continue a prompt with a causal LM.

    EvalError, at the call and not at the first token, for an empty prompt, tokens that the model does not have, and
    more tokens than it was made for.
    """
    check_prompt(model, prompt, max_new_tokens)
    return decode(model_step(model), torch.tensor(prompt), max_new_tokens, sampling.chooser(), ends)


def check_prompt(model: CausalLM, prompt: list[int], max_new_tokens: int) -> None:
    """EvalError for what `generate_tokens` refuses."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise EvalError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompt:
        raise EvalError("the prompt has no tokens; give some text")
    check_vocabulary(model, prompt)
    most = longest_context(model)
    if most and len(prompt) + max_new_tokens > most:
        raise EvalError(
            f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones are more than the model's {most}; shorten "
            "the prompt or lower max_new_tokens"
        )


def end_tokens(model: CausalLM, tokenizer: Tokenizer | None = None) -> set[int]:
    """The tokens that end a text: the generation config's; if it names none, the tokenizer's; else none."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    found = [] if ends is None else list(ends) if isinstance(ends, list | tuple | set) else [ends]
    if not all(isinstance(end, int) for end in found):
        raise EvalError(
            f"eos_token_id must be a token id or a list of them, got {ends!r}; mend generation_config.json"
        )
    return set(found)
