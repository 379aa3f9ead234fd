"""Which tensors of a checkpoint lie in its decoder blocks, told from their names and config.json alone; without torch.

Once the model is built, `places.py` knows better. Until then the decoder blocks are the numbered list with most bytes
that is no vision or audio tower. Blocks numbered beyond those that config.json counts are layers that predict further
tokens (MTP) where config.json or their tensors say so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import ModelError
from quantkit.models import families
from quantkit.models.tensors import TensorInfo

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
# (block list, number), the leftmost number counts; Python reads a number of at most 4,300 digits
NUMBERED = re.compile(r"^(?:(.+?)\.)?(\d{1,1000})\..+$")


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a checkpoint. prefix: name of their list. of: tensor name -> number of its block."""

    prefix: str
    count: int
    of: Mapping[str, int]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model: nested in a multimodal model, else all of it."""
    for key in families.TEXT_CONFIGS:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            return text_config(nested)
    return config


def layer_count(config: Mapping[str, Any]) -> int | None:
    """How many decoder blocks config.json counts; None if it does not say."""
    text = text_config(config)
    return next((int(text[key]) for key in LAYER_COUNTS if type(text.get(key)) is int), None)


def hidden_size(config: Mapping[str, Any]) -> int | None:
    """Width of the hidden states by config.json; None if it does not say."""
    values = (part.get(key) for part in (text_config(config), config) for key in _HIDDEN)
    return next((value for value in values if type(value) is int and value > 0), None)


def predicts_further(config: Mapping[str, Any], beyond: Iterable[str]) -> bool:
    """Whether tensors of blocks beyond the last one are MTP layers, by config.json or by their names."""
    parts = (config, text_config(config))
    told = any(type(part.get(key)) is int and part[key] > 0 for part in parts for key in families.MTP_COUNTS)
    return told or any(families.MTP_BLOCK.search(name) for name in beyond)


def find_blocks(path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Blocks:
    """The decoder blocks among the tensors of a checkpoint; ModelError if there are none or some are missing."""
    lists: dict[str, dict[str, int]] = {}  # prefix of a numbered list -> its tensors and their numbers
    for name in tensors:
        if match := NUMBERED.match(name):
            lists.setdefault(match[1] or "", {})[name] = int(match[2])
    sizes: dict[str, int] = {}
    for each, members in lists.items():
        matrices = [n for n in members if n.endswith(".weight") and len(tensors[n].shape) == 2]
        counted = [tensors[n].nbytes for n in matrices if not families.MTP.search(n)]
        if counted and not families.tower(each):
            sizes[each] = sum(counted)
    if not sizes:
        raise ModelError(
            f"{path}: no numbered decoder blocks among {len(tensors)} tensors; "
            "only causal language models with a list of decoder blocks can be quantized"
        )
    prefix = max(sizes, key=sizes.__getitem__)
    of = lists[prefix]
    blocks = layer_count(config)
    beyond = {name for name, number in of.items() if blocks is not None and number >= blocks}
    if len(beyond) < len(of) and predicts_further(config, beyond):
        of = {name: number for name, number in of.items() if name not in beyond}
    numbers = sorted(set(of.values()))
    if numbers[-1] >= len(numbers):  # compared before anything counts that far: the number may be absurd
        first = next(i for i, number in enumerate(numbers) if number != i)
        raise ModelError(
            f"{path}: {prefix} has blocks up to {numbers[-1]} but none numbered {first}; the checkpoint "
            "is incomplete, fetch it again"
        )
    return Blocks(prefix, len(numbers), of)
