"""Facts about a causal LM: where its inputs go and how long they may be; and eval mode while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quantkit_eval.errors import EvalError
from quantkit_eval.protocols import CausalLM


@contextmanager
def inference(*models: CausalLM) -> Iterator[None]:
    """No gradients, and eval mode for every module; each gets its own mode back afterwards."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        if training:
            for model in models:
                model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def device_of(model: CausalLM) -> torch.device:
    """Where input ids go. A model that accelerate spreads may keep its first weights on meta; then its hook knows."""
    if model.device.type != "meta":
        return model.device
    hook = getattr(model, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def longest_context(model: CausalLM) -> int | None:
    """Tokens the model was made for, or None where its config does not say. EvalError for what is no such number."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise EvalError(
            f"config.json says max_position_embeddings: {most!r}; it must be a number of tokens above 0"
        )
    return most


def check_vocabulary(model: CausalLM, ids: list[int]) -> None:
    """EvalError for a token that the model has no row for: torch's index error would end the process on CUDA."""
    rows = model.config.get_text_config().vocab_size
    if ids and max(ids) >= rows:
        raise EvalError(
            f"the tokenizer gives token {max(ids)}, the model has {rows}; use the tokenizer it was made with"
        )


def run(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits [windows, context, vocabulary] of ids [windows, context], without a key-value cache."""
    return model(input_ids=ids.to(device_of(model)), use_cache=False).logits
