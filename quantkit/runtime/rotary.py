"""Rotary tables for the native decoder, computed by the model's own rotary module, so every rope type is right."""

from __future__ import annotations

import copy

import torch
from torch import nn

_BLOCK = 512  # positions computed ahead


class Rotary:
    """cos and sin of the positions of one sequence, fp32 [length, rotary_dim] each.

    The frequencies of "dynamic" and "longrope" depend on the length of the sequence. These modules are called with the
    positions that transformers would pass in one forward; as that changes the module, a copy is used.
    """

    def __init__(self, module: nn.Module) -> None:
        kind = getattr(module, "rope_type", "default")
        self._ahead = 1 if "dynamic" in kind or kind == "longrope" else _BLOCK
        self._module = copy.deepcopy(module) if self._ahead == 1 else module
        self._cos = self._sin = torch.empty(0, 0)

    @torch.no_grad()
    def rows(self, start: int, stop: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of positions [start, stop), within a forward that ends before `end`."""
        have = len(self._cos)
        if have < end:
            upto = max(end, have + self._ahead)
            positions = torch.arange(have, upto)[None]
            cos, sin = self._module(torch.empty(1, 1, 1), positions)  # (1, positions, rotary_dim)
            grown = [(cos[0], sin[0])] if have == 0 else [(self._cos, self._sin), (cos[0], sin[0])]
            self._cos, self._sin = (torch.cat(part) for part in zip(*grown, strict=True))
        return self._cos[start:stop], self._sin[start:stop]

    def truncate(self, length: int) -> None:
        """Drop the positions from `length` on."""
        self._cos, self._sin = self._cos[:length], self._sin[:length]
