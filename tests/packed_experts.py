"""Tiny mixtures whose experts are linears of their own, dense or packed, without files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from quantkit.algorithms.rtn import rtn
from quantkit.layers.quant_linear import QuantLinear
from quantkit.models.experts import ROLES, Experts, SlottedExperts, is_stacked, part_of, stack_of
from quantkit.scheme import Grid

KEPT = ("lm_head", "shared_expert_gate")


def apart(model: nn.Module) -> nn.Module:
    """The model with `Experts` in place of every stacked module, in place."""
    for name, module in list(model.named_modules()):
        if is_stacked(module):
            kind = SlottedExperts if "Llama4" in type(module).__name__ else Experts
            model.set_submodule(name, _filled(kind(module, ROLES), module))
    return model.requires_grad_(False)


def _filled(experts: Experts, stacked: nn.Module) -> Experts:
    for number in range(experts.shape.experts):
        for role in experts.names:
            linear = experts.linear(number, role)
            for leaf in ("weight", "bias"):
                if getattr(linear, leaf) is not None:
                    holder = stacked.get_parameter(stack_of(role, leaf, experts.shape))
                    part = part_of(holder, number, role, leaf, experts.shape)
                    setattr(linear, leaf, nn.Parameter(part.clone(), requires_grad=False))
    return experts


def packed(
    model: nn.Module, grid: Callable[[str], Grid | None] | Grid, inputs: Grid | None = None
) -> nn.Module:
    """The model with a `QuantLinear` in place of every linear that has a grid, in place. Not prepared."""
    for name, module in list(model.named_modules()):
        wanted = grid if isinstance(grid, Grid) else grid(name)
        if isinstance(module, nn.Linear) and wanted is not None and not name.endswith(KEPT):
            bias = None if module.bias is None else module.bias.data
            weight = rtn(module.weight.data, wanted, torch.bfloat16)
            model.set_submodule(name, QuantLinear.from_quantized(weight, bias, inputs=inputs))
    return model.requires_grad_(False)
