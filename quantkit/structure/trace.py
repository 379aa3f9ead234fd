"""Find which tensors the linears of a decoder block read, by following tensor identity through one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Trace:
    """The connections that one forward of a block has shown. Names are module names inside the block.

    siblings: sets of linears that read the same tensor, in the order of execution. calls: every call of a linear, in
    order. norms: siblings -> the norm whose output they read. output_of: submodule -> the linear inside it whose
    output it returns unchanged (alone, or first in a tuple or list, the rest None); of two nested
    ones the inner comes first. experts: module that calls linears of its own choice (`is_experts`) -> how many sets of
    siblings have run before it.
    """

    siblings: tuple[tuple[str, ...], ...]
    calls: tuple[str, ...]
    norms: dict[tuple[str, ...], str]
    output_of: dict[str, str]
    experts: dict[str, int] = field(default_factory=dict)


def is_linear(module: nn.Module) -> bool:
    """A linear layer: nn.Linear, transformers' Conv1D, or a module that says so by `is_linear = True`."""
    return isinstance(module, (nn.Linear, Conv1D)) or getattr(module, "is_linear", False)


def is_norm(module: nn.Module) -> bool:
    """Whether a module may scale channels: its only tensors are a vector `weight` and perhaps a vector `bias`."""
    parameters = dict(module.named_parameters())
    named = set(parameters) in ({"weight"}, {"weight", "bias"})
    return named and not is_linear(module) and all(p.dim() == 1 for p in parameters.values())


def matrix(linear: nn.Module) -> torch.Tensor:
    """The weight as [out, in], sharing memory with the parameter (Conv1D stores [in, out])."""
    weight = linear.get_parameter("weight").data
    return weight.T if isinstance(linear, Conv1D) else weight


@torch.no_grad()
def trace(block: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Run `block(hidden, *args, **kwargs)` once and record which linear reads which tensor.

    The block is in eval mode, and the call has no KV cache.
    """
    siblings: dict[tuple[Any, ...], list[str]] = {}
    norms: dict[tuple[Any, ...], str] = {}
    calls: list[str] = []
    made: dict[str, tuple[torch.Tensor, int]] = {}  # linear -> its output and the version it had then
    output_of: dict[str, str] = {}
    experts: dict[str, int] = {}
    alive: list[
        torch.Tensor
    ] = []  # a tensor that died would lend its memory, and so its identity, to another

    def reads(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            alive.append(x)
            if name not in calls:
                siblings.setdefault(_identity(x), []).append(name)
            calls.append(name)

        return hook

    def makes(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if isinstance(out, torch.Tensor):  # a router that is a kind of linear may return more
                made[name] = (out, _version(out))

        return hook

    def normalises(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            alive.append(out)
            norms[_identity(out)] = name

        return hook

    def returns(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if isinstance(out, tuple | list) and out and all(item is None for item in out[1:]):
                out = out[0]
            for linear, (tensor, version) in made.items():
                if out is tensor and _version(tensor) == version and linear.startswith(f"{name}."):
                    output_of[name] = linear

        return hook

    def chooses(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            experts.setdefault(name, len(siblings))

        return hook

    handles = []
    for name, module in block.named_modules():
        if getattr(module, "is_experts", False):
            handles.append(module.register_forward_pre_hook(chooses(name)))
        elif is_linear(module):
            handles.append(module.register_forward_pre_hook(reads(name), with_kwargs=True))
            handles.append(module.register_forward_hook(makes(name)))
        elif is_norm(module):
            handles.append(module.register_forward_hook(normalises(name)))
        elif name and any(module.children()):
            handles.append(module.register_forward_hook(returns(name)))
    try:
        block(hidden, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    norm_of = {tuple(names): norms[key] for key, names in siblings.items() if key in norms}
    return Trace(
        tuple(tuple(names) for names in siblings.values()), tuple(calls), norm_of, output_of, experts
    )


def first_output(out: Any) -> torch.Tensor:
    """The hidden states that a block, an attention or an MLP returns, alone or first in a tuple or list."""
    hidden: torch.Tensor = out[0] if isinstance(out, tuple | list) else out
    return hidden


def _identity(x: torch.Tensor) -> tuple[Any, ...]:
    """A key that two living tensors share exactly if they are the same rows of the same memory, unchanged."""
    layout = (x.numel(), x.shape[-1]) if x.is_contiguous() else (tuple(x.shape), x.stride())
    return x.data_ptr(), _version(x), x.dtype, layout


def _version(x: torch.Tensor) -> int:
    """The tensor's version counter, which counts in-place writes; inference-mode tensors have none."""
    return 0 if x.is_inference() else x._version
