"""Linears of several experts in one module, which is called with the tokens of each in turn (JetMoE).

transformers keeps them as one parameter [E, N, K]. Here each is a linear of its own and belongs to its block like any
other: it reads rows that its router has chosen, which differ between two streams.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn


class ParallelLinears(nn.Module):
    """Called as there: (inputs [T, K], sorted by expert; how many each has) -> [T, N].

    Expert e's linear is child "e".
    """

    chooses_rows = True  # what its linears read is chosen by a router

    def __init__(self, stacked: nn.Module) -> None:
        super().__init__()
        weight = stacked.get_parameter("weight")
        count, rows, columns = weight.shape
        with torch.device("meta"):
            for number in range(count):
                linear = nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
                self.add_module(str(number), linear.requires_grad_(False))

    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        """Every linear runs, on no tokens too, so that all are seen."""
        parts = inputs.split(expert_size)
        return torch.cat([linear(x) for linear, x in zip(self.children(), parts, strict=True)])

    @torch.no_grad()
    def with_weights(self, stacked: nn.Module) -> ParallelLinears:
        """Such linears with the weights of a stacked module that is loaded."""
        made = ParallelLinears(stacked)
        for linear, weight in zip(made.children(), stacked.get_parameter("weight"), strict=True):
            linear.register_parameter("weight", nn.Parameter(weight.clone(), requires_grad=False))
        return made.eval()


def is_parallel(module: nn.Module) -> bool:
    """Whether a module of transformers is one parameter [E, N, K], called with the tokens of each expert in turn."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 3 or len(module._parameters) > 1 or module._modules:
        return False
    return list(inspect.signature(type(module).forward).parameters)[1:] == ["inputs", "expert_size"]
