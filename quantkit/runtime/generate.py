"""`generate` and `stream`: token ids continued by a model, the fastest way that it can run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import torch
from quantkit_eval.errors import EvalError
from quantkit_eval.loop import end_tokens, generate_tokens
from quantkit_eval.sampler import Sampling

from quantkit.errors import memory_named
from quantkit.runtime.dispatch import choose_runner
from quantkit.runtime.graphs import GraphDecoder
from quantkit.runtime.native import NativeDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@memory_named()
def generate(
    model: PreTrainedModel | NativeDecoder | GraphDecoder,
    input_ids: torch.Tensor,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = 0,
    stop: Collection[int] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """The prompt and its continuation, int64 [1, length], with the stop token if one came; options as in `stream`.

    on_token is called with every new token as soon as it is known.
    """
    new = []
    for token in stream(model, input_ids, max_new_tokens, temperature, top_k, top_p, seed, stop):
        new.append(token)
        if on_token:
            on_token(token)
    prompt = _prompt(input_ids)
    return torch.cat([prompt, torch.tensor(new, dtype=torch.int64)])[None]


def stream(
    model: PreTrainedModel | NativeDecoder | GraphDecoder,
    input_ids: torch.Tensor,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = 0,
    stop: Collection[int] | None = None,
) -> Iterator[int]:
    """Continue input_ids [length] or [1, length], one token at a time.

    temperature 0 is greedy; top_k 0 and top_p 1 leave every token in. seed: of a random generator of its own, None
    for another one each time. Ends after a token of `stop` (None: the end tokens of the generation config) or after
    `max_new_tokens`. A model that must run eager does so with a warning that says why.

    Raises EvalError (a ValueError) for options out of range, an empty or too long prompt, and tokens that the model
    does not have.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    prompt = _prompt(input_ids)
    runner = choose_runner(model, max_new_tokens)
    if runner.reason:
        warnings.warn(f"runs eager: {runner.reason}", stacklevel=3)
    ends = end_tokens(runner.model) if stop is None else set(stop)
    tokens = generate_tokens(runner.model, prompt.tolist(), max_new_tokens, sampling, ends)
    return (token.id for token in tokens)


def _prompt(input_ids: torch.Tensor) -> torch.Tensor:
    """[length] or [1, length] -> [length] on the CPU."""
    if input_ids.dim() == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    if input_ids.dim() != 1:
        raise EvalError(f"generate takes one sequence, [length] or [1, length], got {list(input_ids.shape)}")
    return input_ids.to("cpu", torch.int64)
