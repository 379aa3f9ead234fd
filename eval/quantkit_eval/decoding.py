"""A model run with decode semantics: a token sees the earlier tokens as a key-value cache holds them.

A quantized cache changes what a model computes only through what later tokens read from it. A forward without a cache
does not show that, and one forward over a whole window shows it only for caches that round every entry once, when it
comes, and let every token read the rounded entries, its own included: for them the window at once equals token by
token. A cache that keeps its newest tokens exact for a while (the residual window of KIVI) rounds entries later, so it
must be filled as in decoding. A cache says so itself:

    exact_chunk   tokens that one forward may add for results equal to those of one token at a time; None: any number.
                  A cache without this attribute is filled one token at a time, which is always right.
    description   what the cache is, in words, for the report; without it the name of its class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantkit_eval.errors import EvalError
from quantkit_eval.model import device_of
from quantkit_eval.protocols import CausalLM

CacheFactory = Callable[[], Any]
"""Gives a new, empty key-value cache, as transformers' models take for `past_key_values`."""


def described(cache: Any) -> str:
    """What a cache is, in words."""
    return str(getattr(cache, "description", None) or type(cache).__name__)


def chunk_of(cache: Any, wanted: int | None) -> int | None:
    """Tokens per forward: `wanted`, else what the cache allows; None: a window at once. EvalError for less than 1."""
    if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1):
        raise EvalError(f"cache_step must be at least 1 token, got {wanted!r}")
    chunk: int | None = getattr(cache, "exact_chunk", 1) if wanted is None else wanted
    return chunk


def same_cache(returned: Any, given: Any) -> None:
    """EvalError if the cache that a forward returned is not the one it was given: then that one was not used."""
    if returned is not given:
        raise EvalError(
            f"the model was given a cache of type {type(given).__name__} and returned {type(returned).__name__}; it "
            "does not run with a cache that it is given, so this cache cannot be evaluated with it"
        )


class Decoding:
    """Logits of a causal LM whose tokens read the earlier ones from caches that a factory makes, one for each batch.

    step: tokens per forward, None: what the cache says of itself.
    """

    def __init__(self, model: CausalLM, cache: CacheFactory, step: int | None = None) -> None:
        self._model, self._cache = model, cache
        first = cache()
        self.description, self.step = described(first), chunk_of(first, step)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[windows, context, vocabulary] of ids [windows, context]."""
        cache, device = self._cache(), device_of(self._model)
        found: torch.Tensor | None = None
        at = 0
        for part in ids.split(self.step or ids.shape[1], dim=1):
            out = self._model(input_ids=part.to(device), past_key_values=cache, use_cache=True)
            same_cache(out.past_key_values, cache)
            if found is None:
                found = out.logits.new_empty(*ids.shape, out.logits.shape[-1])
            found[:, at : at + part.shape[1]] = out.logits
            at += part.shape[1]
        assert found is not None
        return found
