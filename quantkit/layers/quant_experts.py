"""`QuantExperts`: the packed experts of one layer of a mixture, all of them multiplied in one call per role."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import quantkit_kernels
import torch
from quantkit_kernels import GroupedCall
from torch import nn
from torch.compiler import is_compiling

from quantkit.layers.quant_linear import QuantLinear

DIFFER = "they differ"  # how `why_not` begins for experts of several kinds


class QuantExperts(nn.Module):
    """(hidden [T, H], index [T, K], weights [T, K]) -> [T, H], as the module it stands for, with the same children.

    unfused: the experts as a loop over linears (`quantkit.models.experts.Experts`); its linears are `QuantLinear`s
    that are prepared and alike (`why_not`). Tokens are sorted by expert; gate and up of all experts are one product,
    down is another, and the weighted outputs are added up in the order of the experts. Only experts that were chosen
    are read. Gradients and compilers go through the loop.
    """

    is_experts = True
    _calls: tuple[GroupedCall, GroupedCall] | None = None  # gate and up, down; hold addresses

    def __init__(self, unfused: nn.Module) -> None:
        super().__init__()
        if why := why_not(unfused):
            raise ValueError(f"these experts run one by one: {why}")
        for name, child in unfused.named_children():
            self.add_module(name, child)
        self.__dict__["unfused"] = unfused  # past nn.Module's bookkeeping: its children are ours

    def __getattr__(self, name: str) -> Any:
        """What a family's own code asks of its experts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "unfused" not in self.__dict__:
                raise
            return getattr(self.__dict__["unfused"], name)

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        unfused = self.__dict__["unfused"]
        if hidden.dim() > 2:
            return self.forward(hidden.flatten(0, -2), index, weights).view(hidden.shape)
        wants_gradient = hidden.requires_grad and torch.is_grad_enabled()
        if wants_gradient or hidden.is_meta or is_compiling() or not index.numel():
            return self._one_by_one(hidden, index, weights)
        calls, count = self._calls or self._bind(), unfused.shape.experts
        chosen = index.reshape(-1)
        order = chosen.argsort(stable=True)  # by expert, (T K)
        offsets = torch.searchsorted(chosen[order], torch.arange(count + 1, device=index.device))
        elsewhere = hidden.device.type == "cpu" and int(offsets[-1]) < len(
            chosen
        )  # on a GPU nothing is waited for
        if calls is None or elsewhere:
            return self._one_by_one(hidden, index, weights)
        rows = order // index.shape[1]
        both = calls[0](hidden, rows, offsets)  # (T K, I or 2 I)
        out = calls[1](
            unfused.combined(both), torch.arange(len(rows), device=rows.device), offsets
        )  # (T K, H)
        out = unfused.behind(out) * weights.reshape(-1)[order, None]
        return torch.zeros_like(hidden).index_add_(0, rows, out.to(hidden.dtype))

    def _one_by_one(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.__dict__["unfused"](hidden, index, weights)
        return found

    def _bind(self) -> tuple[GroupedCall, GroupedCall] | None:
        """The two products bound to the linears as they are now; None if they are not packed and alike any more."""
        unfused = self.__dict__["unfused"]
        if why_not(unfused):
            return None
        inner = [role for role in ("gate", "up") if role in unfused.names]
        self._calls = (
            _bound(list(_linears(unfused, inner)), len(inner)),
            _bound(list(_linears(unfused, ["down"])), 1),
        )
        return self._calls

    def forget(self) -> None:
        """Let go of layouts that were replaced."""
        self._calls = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantExperts:
        nn.Module._apply(self, fn, recurse)
        self.forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_calls": None}


def why_not(unfused: nn.Module) -> str | None:
    """Why experts run one by one, or None if one call per role can take them all."""
    experts: Any = unfused
    if not experts.routed:
        return "each is called with tokens of its own"
    if experts.total != experts.shape.experts:
        return "some have no weights"
    inner = [role for role in ("gate", "up") if role in experts.names]
    for roles in (inner, ["down"]):
        linears = list(_linears(experts, roles))
        packed = [linear for linear in linears if isinstance(linear, QuantLinear)]
        if len(packed) < len(linears):
            return f"{len(linears) - len(packed)} of their {len(linears)} {' and '.join(roles)} linears are not packed"
        for linear in packed:
            if not linear.prepared:
                return f"backend {linear.backend!r} multiplies by the stored tensors"
            if linear.ordered or (linear.scheme.inputs is not None and linear.compute == "float"):
                return "the inputs of each linear are ordered or rounded before the kernel"
            if linear.spec != packed[0].spec or (linear.backend, linear.dtype) != (
                packed[0].backend,
                packed[0].dtype,
            ):
                return f"{DIFFER}: {linear.spec} beside {packed[0].spec}"
    return None


def _linears(experts: Any, roles: Sequence[str]) -> Iterator[nn.Module]:
    """The linears of some roles, expert by expert."""
    for number in range(experts.shape.experts):
        for role in roles:
            yield experts.linear(number, role)


def _bound(linears: Sequence[Any], each: int) -> GroupedCall:
    """The product of the backend on the buffers of these linears, which may still be replaced."""
    first: QuantLinear = linears[0]
    assert first.dtype is not None
    backend = quantkit_kernels.backend(first.backend)
    layouts = [linear.live_layout for linear in linears]
    return backend.bind_grouped(layouts, lambda i: linears[i].bias, each, first.dtype)


def fuse_experts(model: nn.Module) -> dict[str, str]:
    """Put `QuantExperts` in place of all experts that it takes; returns {name: why not} of the others.

    Experts without packed linears are neither.
    """
    left = {}
    for name, module in list(model.named_modules()):
        if not getattr(type(module), "is_experts", False) or isinstance(module, QuantExperts):
            continue
        if not any(isinstance(each, QuantLinear) for each in module.modules()):
            continue
        if why := why_not(module):
            left[name] = why
        else:
            model.set_submodule(name, QuantExperts(module))
    return left
