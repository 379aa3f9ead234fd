"""The KV cache of a decoder block while it is being calibrated.

A block is called with a cache object, where the model would put its own. The object keeps nothing: `update` gets keys
after rotary embedding and values as projected, and returns what attention is to read. So the range of both is seen, and
the quantized stream reads them rounded, for every architecture that hands its cache to its blocks. One forward over a
window shows what decoding token by token does, as every entry is rounded once, when it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from quantkit.numerics.kv import KVScales, rounded
from quantkit.scheme import KVScheme

Act = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class PassingCache(DynamicCache):
    """An empty cache whose `update` gives (keys, values), [B, H, T, d], to `act` and returns what that returns."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self._act = act

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._act(key_states, value_states)


@dataclass
class BlockKV:
    """How one block's cache is quantized. scales: of a scheme with stored scales, once they are calibrated. followed:
    whether the quantized stream is to see it.
    """

    scheme: KVScheme
    scales: KVScales | None = None
    followed: bool = True

    @property
    def ready(self) -> bool:
        """Whether the quantized stream reads rounded entries.

        Not with a residual window: which entries are rounded depends on who reads them.
        """
        return self.followed and not self.scheme.residual and (self.scheme.dynamic or self.scales is not None)

    def cache(self) -> PassingCache:
        """A cache that gives every entry rounded."""
        return PassingCache(lambda keys, values: rounded(keys, values, self.scheme, self.scales))
