"""`generate`: one sequence, token by token, native on the CPU and in a CUDA graph on a GPU where the model allows."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from quantkit_eval.model import check_vocabulary, device_of, inference, longest_context
from quantkit_eval.sampler import pick
from torch import nn

from quantkit.errors import ModelError
from quantkit.runtime.graphs import GraphDecoder, graphed
from quantkit.runtime.native import NativeDecoder, native


def generate(
    model: nn.Module | NativeDecoder | GraphDecoder,
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

    on_token is called with every new token as soon as it is there.
    """
    new = []
    for token in stream(model, input_ids, max_new_tokens, temperature, top_k, top_p, seed, stop):
        new.append(token)
        if on_token:
            on_token(token)
    prompt = _prompt(input_ids)
    return torch.cat([prompt, torch.tensor(new, dtype=torch.int64)])[None]


def stream(
    model: nn.Module | NativeDecoder | GraphDecoder,
    input_ids: torch.Tensor,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = 0,
    stop: Collection[int] | None = None,
) -> Iterator[int]:
    """Continue input_ids [length] or [1, length], one token at a time.

    temperature 0 is greedy; top_k 0 and top_p 1 leave every token in. Ends after a token of `stop` (None: the end
    tokens of the generation config) or `max_new_tokens`. Draws from a generator of its own; seed None: a new one
    each time. On a CPU a model that the native path does not know runs eager, with a warning that says why, and so
    does one on CUDA whose step cannot be captured in a graph.

    ModelError for an empty or too long prompt and options out of range; EvalError for tokens that the model does not
    have.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ModelError(
            f"temperature and top_k are at least 0, top_p in (0, 1]; got {temperature}, {top_k} and {top_p}"
        )
    runner = model if isinstance(model, NativeDecoder | GraphDecoder) else _runner(model, max_new_tokens)
    prompt = _prompt(input_ids)
    check_vocabulary(runner, prompt.tolist())
    most = longest_context(runner)
    if not len(prompt) or max_new_tokens < 1 or (most and len(prompt) + max_new_tokens > most):
        raise ModelError(
            f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones: at least one of each is needed"
            + (f", and together at most the model's {most}" if most else "")
        )
    random = torch.Generator()
    random.seed() if seed is None else random.manual_seed(seed)
    return _steps(
        runner,
        prompt,
        max_new_tokens,
        _ends(runner, stop),
        lambda l: pick(l, temperature, top_k, top_p, random),
    )


def _steps(
    runner: Any, prompt: torch.Tensor, most: int, ends: set[int], choose: Callable[[torch.Tensor], int]
) -> Iterator[int]:
    known = inspect.signature(runner.forward).parameters
    kept = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    tokens, cache, device = prompt[None], None, device_of(runner)
    for _ in range(most):
        with inference(runner):
            out = runner(input_ids=tokens.to(device), past_key_values=cache, use_cache=True, **kept)
        cache, token = out.past_key_values, choose(out.logits[0, -1])
        yield token
        if token in ends:
            return
        tokens = torch.tensor([[token]])


def _runner(model: nn.Module, new_tokens: int) -> Any:
    device = device_of(model).type
    if device not in ("cpu", "cuda"):
        return model
    found = native(model) if device == "cpu" else graphed(model, new_tokens)
    if isinstance(found, str):
        warnings.warn(f"runs eager: {found}", stacklevel=4)
        return model
    return found


def _prompt(input_ids: torch.Tensor) -> torch.Tensor:
    """[length] or [1, length] -> [length] on the CPU."""
    if input_ids.dim() == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    if input_ids.dim() != 1:
        raise ModelError(f"generate takes one sequence, [length] or [1, length], got {list(input_ids.shape)}")
    return input_ids.to("cpu", torch.int64)


def _ends(runner: Any, stop: Collection[int] | None) -> set[int]:
    if stop is not None:
        return set(stop)
    ends = getattr(runner.generation_config, "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
