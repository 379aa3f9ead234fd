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


class _Seen:
    """What hooks have seen during one forward; every method gives the hook for the module of one name."""

    def __init__(self) -> None:
        self.siblings: dict[tuple[Any, ...], list[str]] = {}
        self.norms: dict[tuple[Any, ...], str] = {}
        self.calls: list[str] = []
        self.output_of: dict[str, str] = {}
        self.experts: dict[str, int] = {}
        self._made: dict[
            str, tuple[torch.Tensor, int]
        ] = {}  # linear -> its output and the version it had then
        # a tensor that died would lend its memory, and so its identity, to another
        self._alive: list[torch.Tensor] = []

    def reads(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._alive.append(x)
            if name not in self.calls:
                self.siblings.setdefault(_identity(x), []).append(name)
            self.calls.append(name)

        return hook

    def makes(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if isinstance(out, torch.Tensor):  # a router that is a kind of linear may return more
                self._made[name] = (out, _version(out))

        return hook

    def normalises(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            self._alive.append(out)
            self.norms[_identity(out)] = name

        return hook

    def returns(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if isinstance(out, tuple | list) and out and all(item is None for item in out[1:]):
                out = out[0]
            for linear, (tensor, version) in self._made.items():
                if out is tensor and _version(tensor) == version and linear.startswith(f"{name}."):
                    self.output_of[name] = linear

        return hook

    def chooses(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.experts.setdefault(name, len(self.siblings))

        return hook


@torch.no_grad()
def trace(block: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Run `block(hidden, *args, **kwargs)` once and record which linear reads which tensor.

    The block is in eval mode, and the call has no KV cache.
    """
    seen, handles = _Seen(), []
    for name, module in block.named_modules():
        if getattr(module, "is_experts", False):
            handles.append(module.register_forward_pre_hook(seen.chooses(name)))
        elif is_linear(module):
            handles.append(module.register_forward_pre_hook(seen.reads(name), with_kwargs=True))
            handles.append(module.register_forward_hook(seen.makes(name)))
        elif is_norm(module):
            handles.append(module.register_forward_hook(seen.normalises(name)))
        elif name and any(module.children()):
            handles.append(module.register_forward_hook(seen.returns(name)))
    try:
        block(hidden, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(
        siblings=tuple(tuple(names) for names in seen.siblings.values()),
        calls=tuple(seen.calls),
        norms={tuple(names): seen.norms[key] for key, names in seen.siblings.items() if key in seen.norms},
        output_of=seen.output_of,
        experts=seen.experts,
    )


def first_output(out: Any) -> torch.Tensor:
    """The hidden states that a block, an attention or an MLP returns, alone or first in a tuple or list."""
    hidden: torch.Tensor = out[0] if isinstance(out, tuple | list) else out
    return hidden


def _identity(x: torch.Tensor) -> tuple[Any, ...]:
    """A key that two living tensors share exactly if they are the same rows of the same memory, unchanged."""
    if not x.numel():  # no memory: all such tensors have one address
        return (id(x),)
    layout = (x.numel(), x.shape[-1]) if x.is_contiguous() else (tuple(x.shape), x.stride())
    return x.data_ptr(), _version(x), x.dtype, layout


def _version(x: torch.Tensor) -> int:
    """The tensor's version counter, which counts in-place writes; inference-mode tensors have none."""
    return 0 if x.is_inference() else x._version
