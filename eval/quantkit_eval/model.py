"""What evaluation asks of a causal LM: where its inputs go, how far it reaches, that it is in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from quantkit_eval.errors import EvalError


@contextmanager
def inference(*models: Any) -> Iterator[None]:
    """No gradients, and eval mode for every module; each gets its own mode back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: Any) -> torch.device:
    """Where input ids go; a model spread by accelerate may keep its first weights on meta, its hook knows."""
    if model.device.type != "meta":
        return model.device
    hook = getattr(model, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def longest_context(model: Any) -> int | None:
    """Tokens the model was made for, or None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_vocabulary(model: Any, ids: list[int]) -> None:
    """A token the model has no row for would be an index error, on CUDA one that ends the process."""
    rows = model.config.get_text_config().vocab_size
    if ids and max(ids) >= rows:
        raise EvalError(
            f"the tokenizer gives token {max(ids)}, the model has {rows}; use the tokenizer it was made with"
        )
