"""The proof that experts with linears of their own compute what the stacked module of transformers computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from quantkit.errors import ModelError
from quantkit.models.experts import Experts, Shape, SlottedExperts, part_of, shape_of, stack_of
from quantkit.models.parallel import ParallelLinears

_TOLERANCE = 1e-6  # relative; the proof runs in float64, but some families add up in fp32


@torch.no_grad()
def prove(stacked: nn.Module, unfused: type[Experts], names: Mapping[str, str]) -> None:
    """ModelError unless `Experts` gives what the stacked module gives, on small random weights and tokens, in float64.

    The small module is a copy of the stacked one with its sizes changed wherever they stand in it.
    """
    with torch.device("cpu"):  # a model is loaded under a device of its own
        off = _difference(stacked, unfused, names)
    if not off < _TOLERANCE:
        raise ModelError(
            f"{type(stacked).__name__}: its experts, taken apart, give another output (relative difference {off:.2g}); "
            "this kind of experts is not supported"
        )


@torch.no_grad()
def prove_parallel(stacked: nn.Module) -> None:
    """The same of linears of several experts, called with the tokens of each in turn (`ParallelLinears`)."""
    generator, sizes = torch.Generator().manual_seed(0), [2, 0, 3]
    small = copy.copy(stacked)
    count = stacked.get_parameter("weight").shape[0]
    small.__dict__.update({n: 3 for n, v in vars(stacked).items() if type(v) is int and v == count})
    weight = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, device="cpu")
    small.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    inputs = torch.randn(sum(sizes), 4, generator=generator, dtype=torch.float64, device="cpu")
    with torch.device("cpu"):
        wanted = type(stacked).forward(small, inputs, sizes)
        got = ParallelLinears(small).with_weights(small)(inputs, sizes)
    if wanted.shape != got.shape or not torch.allclose(wanted, got, rtol=_TOLERANCE):
        raise ModelError(f"{type(stacked).__name__}: its experts, taken apart, give another output")


def _difference(stacked: nn.Module, unfused: type[Experts], names: Mapping[str, str]) -> float:
    """The largest relative difference of `prove`."""
    small, shape = _small(stacked)
    experts = unfused(small, names)
    generator = torch.Generator().manual_seed(0)
    for parameter in small.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    for number in range(shape.experts):
        for role in names:
            linear = experts.linear(number, role)
            for leaf, _ in list(linear.named_parameters()):
                value = part_of(small.get_parameter(stack_of(role, leaf, shape)), number, role, leaf, shape)
                setattr(linear, leaf, nn.Parameter(value.clone(), requires_grad=False))
    tokens = 12
    hidden = torch.randn(tokens, shape.hidden, generator=generator, dtype=torch.float64)
    if unfused is SlottedExperts:
        hidden = hidden.repeat(shape.experts, 1)
        hidden[::3] = 0
        given: tuple[torch.Tensor, ...] = (hidden,)
    else:
        scores = torch.rand(tokens, experts.total, generator=generator, dtype=torch.float64)
        weights, index = scores.topk(min(2, experts.total), -1)
        given = (hidden, index, weights)
    try:
        forward = getattr(type(stacked).forward, "__wrapped__", type(stacked).forward)
        wanted, got = forward(small, *given), experts(*given)
        wanted = wanted.view(got.shape)  # some give [T, 1, H]
        return float((wanted - got).abs().max() / wanted.abs().max())
    except Exception as error:
        raise ModelError(
            f"{type(stacked).__name__} does not run with experts taken apart: {type(error).__name__}: {error}; "
            "this kind of experts is not supported"
        ) from error


def _small(stacked: nn.Module) -> tuple[nn.Module, Shape]:
    """(a copy with three experts of few features in float64, its shape)."""
    shape = shape_of(stacked)
    width = 4
    hidden = width if shape.hidden == shape.width else 2 * width if shape.hidden == 2 * shape.width else 6
    sizes = {2 * shape.width: 2 * width, shape.hidden: hidden, shape.width: width}
    few = min(3, shape.experts)
    small = copy.copy(stacked)
    small.__dict__.update(_parameters={}, _modules=dict(stacked._modules), _buffers=dict(stacked._buffers))
    extra = int(getattr(stacked, "total_experts", shape.experts)) - shape.experts
    counts = {shape.experts + extra: few + extra, shape.experts: few}
    for name, value in list(vars(small).items()):
        if type(value) is int:
            number = counts.get(value, value) if "expert" in name else sizes.get(value, value)
            setattr(small, name, number)
    for name, parameter in stacked.named_parameters(recurse=False):
        first, *rest = parameter.shape
        changed = [counts.get(first, first), *(sizes.get(size, size) for size in rest)]
        small._parameters[name] = nn.Parameter(
            torch.empty(changed, dtype=torch.float64, device="cpu"), requires_grad=False
        )
    for name, module in stacked._modules.items():
        if module is not None and any(True for _ in module.parameters()):
            small._modules[name] = _small_part(module, {shape.experts * shape.width: few * width} | sizes)
    return small, shape_of(small)


def _small_part(module: nn.Module, sizes: Mapping[int, int]) -> nn.Module:
    """A copy of what a stacked module holds, such as a norm, with parameters of the small size."""
    made = copy.deepcopy(module)
    for each in made.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                size = [sizes.get(n, n) for n in parameter.shape]
                each._parameters[name] = nn.Parameter(
                    torch.ones(size, dtype=torch.float64), requires_grad=False
                )
    return made
