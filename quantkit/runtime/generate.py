"""`generate`, `stream` and `stream_together`: token ids continued by a model, the fastest way that it can run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from quantkit_eval.errors import EvalError
from quantkit_eval.loop import end_tokens, generate_tokens
from quantkit_eval.sampler import Sampling, seeds
from quantkit_eval.together import Round, check_prompts, decode_together

from quantkit.errors import memory_named
from quantkit.runtime.dispatch import choose_runner
from quantkit.runtime.graphs import GraphDecoder
from quantkit.runtime.native import NativeDecoder
from quantkit.runtime.together import choose_batch

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
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Prompts and their continuations, int64 [B, length], with the stop token if one came; options as in `stream`.

    input_ids: [length], [1, length], or [B, length] for B sequences that decode together, as in `stream_together`.
    attention_mask: the same shape, 0 where a shorter prompt was filled up on its left, as transformers' tokenizers do
    with `padding_side="left"`. Sequences that end before the longest one are filled up on their right with the
    generation config's pad token, else with a stop token, else with 0.
    on_token is called with every new token of a single sequence as soon as it is known.
    """
    if input_ids.dim() == 2 and input_ids.shape[0] > 1 and on_token is not None:
        raise EvalError("on_token follows one sequence; use stream_together for several")
    prompts, padded = _prompts(input_ids, attention_mask)
    options = (max_new_tokens, temperature, top_k, top_p, seed, stop)
    new: list[list[int]] = [[] for _ in prompts]
    if len(prompts) == 1:
        for token in stream(model, torch.tensor(prompts[0], dtype=torch.int64), *options):
            new[0].append(token)
            if on_token:
                on_token(token)
    else:
        for each in stream_together(model, prompts, *options):
            for number, token in each.tokens.items():
                new[number].append(token)
    longest = max(map(len, new))
    fill = _fill(model, stop)
    rows = [row + [fill] * (longest - len(row)) for row in new]
    return torch.cat([padded, torch.tensor(rows, dtype=torch.int64)], 1)


def stream_together(
    model: PreTrainedModel | NativeDecoder | GraphDecoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = 0,
    stop: Collection[int] | None = None,
) -> Iterator[Round]:
    """Continue several prompts of token ids together: each step gives one token of every sequence that has not ended.

    Sequence i draws with seed + i, and gets the tokens that `stream` gives for its prompt alone with that seed: on the
    native path bit for bit (but for weights in FP8 and NF4), in transformers within the rounding of the model's dtype.
    Options and errors as in `stream`.
    """
    samplings = [Sampling(temperature, top_k, top_p, one) for one in seeds(seed, len(prompts))]
    check_prompts(model, prompts, max_new_tokens)
    batch, runner = choose_batch(model)
    if runner.reason:
        warnings.warn(f"runs eager: {runner.reason}", stacklevel=3)
    ends = end_tokens(runner.model) if stop is None else set(stop)
    return decode_together(batch, prompts, max_new_tokens, [each.chooser() for each in samplings], ends)


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
        raise EvalError(f"stream takes one sequence, [length] or [1, length], got {list(input_ids.shape)}")
    return input_ids.to("cpu", torch.int64)


def _prompts(input_ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[list[list[int]], torch.Tensor]:
    """(the tokens of every prompt without padding, all of them as they were given: int64 [B, length])."""
    ids = input_ids[None] if input_ids.dim() == 1 else input_ids
    if ids.dim() != 2 or not ids.shape[0]:
        raise EvalError(f"generate takes token ids [length] or [batch, length], got {list(input_ids.shape)}")
    ids = ids.to("cpu", torch.int64)
    if mask is None:
        return ids.tolist(), ids
    shown = mask[None] if mask.dim() == 1 else mask
    if shown.shape != ids.shape:
        raise EvalError(
            f"attention_mask is {list(mask.shape)}, input_ids {list(input_ids.shape)}; they must match"
        )
    shown = shown.to("cpu") != 0
    wrong = (shown[:, :-1] & ~shown[:, 1:]).any(1)
    if bool(wrong.any()):
        raise EvalError(
            f"prompt {int(wrong.int().argmax()) + 1} is padded behind or inside its tokens; pad on the left "
            "(tokenizer.padding_side = 'left')"
        )
    return [row[own].tolist() for row, own in zip(ids, shown, strict=True)], ids


def _fill(model: PreTrainedModel | NativeDecoder | GraphDecoder, stop: Collection[int] | None) -> int:
    """The token behind sequences that have ended."""
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    if isinstance(pad, int):
        return pad
    return min(end_tokens(model) if stop is None else stop, default=0)
