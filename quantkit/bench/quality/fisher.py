"""A damage estimate for comparison: errors of outputs weighted by the Fisher information of each output channel.

With g the gradient of log p(y) of tokens y drawn from the model itself, KL is 1/2 E[(g . dz)^2] for a small change dz
of a linear's outputs. With g and dz independent over channels and tokens that is
1/2 sum_i E[g_i^2] (dW E[x x^T] dW^T)_ii.

It needs the whole model and its gradients in memory, so it is no part of `quantkit quantize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.algorithms.catalog import algorithm
from quantkit.allocation.groups import Group
from quantkit.numerics.statistics import Statistics
from quantkit.pipeline.run import Run


def fisher_damages(run: Run, model: nn.Module, groups: Sequence[Group], windows: int) -> list[list[float]]:
    """By group and scheme. model: the original, every planned linear a module of its own."""
    assert run.windows is not None
    modules = {layer.module: model.get_submodule(layer.module) for group in groups for layer in group.layers}
    squares, hessians = _statistics(model, modules, run.windows.ids[:windows])
    return [
        [_damage(group, number, modules, squares, hessians) for number in range(len(group.schemes))]
        for group in groups
    ]


def _statistics(
    model: nn.Module, modules: dict[str, nn.Module], ids: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By module: E[g_i^2] of its output channels [N], and E[x x^T] of its inputs [K, K]."""
    squares = {name: torch.zeros(1) for name in modules}
    hessians = {name: torch.zeros(1) for name in modules}

    def seen(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        hessians[name] = hessians[name] + x.T @ x

    def pulled(name: str, module: nn.Module, into: Any, out: tuple[Any, ...]) -> None:
        squares[name] = squares[name] + out[0].flatten(0, -2).square().sum(0)

    handles = [module.register_forward_pre_hook(partial(seen, name)) for name, module in modules.items()]
    handles += [module.register_full_backward_hook(partial(pulled, name)) for name, module in modules.items()]
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        for window in ids:
            logits = model(input_ids=window[None], use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
            model.zero_grad()
    for handle in handles:
        handle.remove()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tokens = ids.numel()
    return {n: s / tokens for n, s in squares.items()}, {n: h / tokens for n, h in hessians.items()}


def _damage(
    group: Group,
    number: int,
    modules: dict[str, nn.Module],
    squares: dict[str, torch.Tensor],
    hessians: dict[str, torch.Tensor],
) -> float:
    total = 0.0
    for layer in group.layers:
        weight, hessian = modules[layer.module].get_parameter("weight").data, hessians[layer.module]
        given = Statistics(1, 2 * hessian, torch.zeros_like(hessian), hessian.diagonal() > 0)
        grid = group.schemes[number].weights
        made = algorithm(layer.algorithm.name).quantize(
            weight.clone(), given, grid, torch.bfloat16, layer.algorithm
        )
        change = made.weight.dequantize(torch.float32) - weight
        total += 0.5 * float((squares[layer.module] * torch.linalg.vecdot(change @ hessian, change)).sum())
    return total
