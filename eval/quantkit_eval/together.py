"""Several prompts continued together, one token of each per step, until each has ended.

What keeps the sequences is a `Batch`: `Apart` runs any model once per sequence, `Padded` runs transformers once for all
of them, and the native decoder has one of its own. Each sequence gets its own chooser, so that what it draws does not
depend on the others. A sequence that has ended takes no further steps, but for `Padded`, which fills its place.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from quantkit_eval.errors import EvalError
from quantkit_eval.loop import check_prompt, model_step
from quantkit_eval.model import device_of, inference
from quantkit_eval.protocols import CausalLM

Chooser = Callable[[torch.Tensor], int]


class Batch(Protocol):
    """B sequences of a model by number, in the order of their prompts."""

    def begin(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Start over with these prompts; logits [B, vocabulary] after each."""

    def step(self, live: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to each of the sequences `live`, in ascending order; logits [len(live), vocabulary]."""


class Round(NamedTuple):
    """New tokens by number of their sequence, and the seconds of the model and of picking them."""

    tokens: dict[int, int]
    seconds: float


class Apart:
    """Every sequence with a key-value cache of its own, one forward each: what each would get alone."""

    def __init__(self, model: CausalLM) -> None:
        self._step, self._states = model_step(model), list[Any]()

    def begin(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        found = [self._step(torch.tensor([list(prompt)]), None) for prompt in prompts]
        self._states = [state for _, state in found]
        return torch.stack([logits for logits, _ in found])

    def step(self, live: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        found = []
        for number, token in zip(live, tokens, strict=True):
            logits, self._states[number] = self._step(torch.tensor([[token]]), self._states[number])
            found.append(logits)
        return torch.stack(found)


class Padded:
    """All sequences in one forward of a transformers model, padded on the left and masked.

    Sums go in another order than those of a sequence alone, so logits agree within the rounding of the model's dtype.
    Only for models whose layers all have a cache of keys and values: others would take in the padding.
    """

    def __init__(self, model: CausalLM, pad: int = 0) -> None:
        self._model, self._pad, self._device = model, pad, device_of(model)
        known = inspect.signature(model.forward).parameters
        self._kept: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._positions = "position_ids" in known
        self._cache: Any = None
        self._mask = torch.empty(0)

    def begin(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (longest - len(each)) + list(each) for each in prompts])
        lengths = torch.tensor([len(each) for each in prompts])
        self._mask = (torch.arange(longest) >= (longest - lengths)[:, None]).long()  # (B, longest)
        self._cache = None
        return self._forward(ids)

    def step(self, live: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        ids = torch.full((len(self._mask), 1), self._pad)
        ids[list(live), 0] = torch.tensor(list(tokens))
        self._mask = torch.cat([self._mask, torch.ones(len(ids), 1, dtype=torch.int64)], 1)
        return self._forward(ids)[list(live)]

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = self._kept | {"attention_mask": self._mask.to(self._device)}
        if self._positions:
            places = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            options["position_ids"] = places.to(self._device)
        with inference(self._model):
            out = self._model(
                input_ids=ids.to(self._device),
                past_key_values=self._cache,
                use_cache=True,
                **options,
            )
        if out.past_key_values is None:
            raise EvalError("the model returns no key-value cache; it cannot be run token by token")
        self._cache = out.past_key_values
        return out.logits[:, -1]


def decode_together(
    batch: Batch,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    choosers: Sequence[Chooser],
    ends: Collection[int] = (),
) -> Iterator[Round]:
    """At most max_new_tokens after each prompt; the last token of a sequence may be one of `ends`."""
    live = list(range(len(prompts)))
    start = time.perf_counter()
    logits = batch.begin(prompts)
    for count in range(1, max_new_tokens + 1):
        tokens = {number: choosers[number](row) for number, row in zip(live, logits, strict=True)}
        yield Round(tokens, time.perf_counter() - start)
        live = [number for number in live if tokens[number] not in ends]
        if not live or count == max_new_tokens:
            return
        start = time.perf_counter()
        logits = batch.step(live, [tokens[number] for number in live])


def check_prompts(model: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """EvalError, with the number of the prompt, for what `loop.generate_tokens` refuses."""
    if not prompts:
        raise EvalError("there is no prompt; give at least one")
    for number, prompt in enumerate(prompts, 1):
        try:
            check_prompt(model, list(prompt), max_new_tokens)
        except EvalError as error:
            raise error if len(prompts) == 1 else EvalError(f"prompt {number}: {error}") from None
