"""What evaluation and generation ask of a tokenizer and of a causal LM; transformers' classes have it all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn


class Group(Protocol):
    """The processes that share an evaluation: this one is number `rank` of `size`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any) -> list[Any]:
        """What each process has given, by rank, in all of them."""


class Tokenizer(Protocol):
    """Text to token ids and back.

    A call takes the text, `add_special_tokens` (default true) and `verbose`, and gives at least "input_ids".
    """

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]: ...

    def decode(self, token_ids: list[int], **options: Any) -> Any: ...


class Output(Protocol):
    """What a causal LM returns: logits [batch, tokens, vocabulary], and its key-value cache if one was asked for."""

    @property
    def logits(self) -> torch.Tensor: ...

    @property
    def past_key_values(self) -> Any: ...


class CausalLM(Protocol):
    """A causal language model as transformers calls one.

    A call takes `input_ids` [batch, tokens], `past_key_values` and `use_cache`, of padded sequences `attention_mask`
    and `position_ids`; `logits_to_keep` if `forward` names it. `config.get_text_config()` says `vocab_size` and, where
    known, `max_position_embeddings`; `generation_config`, which may be missing, says the end tokens. `modules` are
    those whose training mode is switched.
    """

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def forward(self) -> Any: ...

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> Output: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...


class Sequence(Protocol):
    """The tokens that a decoder has seen, and what it keeps of them."""

    def append(self, tokens: torch.Tensor, keep: int = 1) -> torch.Tensor:
        """Run tokens [M]; fp32 logits [keep, vocabulary] of the last `keep`."""

    def truncate(self, length: int) -> None:
        """Forget the tokens after the first `length`."""


class Sequences(CausalLM, Protocol):
    """A causal language model that runs one sequence at a time and can forget its end."""

    def start(self) -> Sequence:
        """A sequence without tokens."""
