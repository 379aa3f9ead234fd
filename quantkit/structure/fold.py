"""Scaling groups: folding scales into a producer and its consumers, and proving that the output stays the same.

A scaling group is a producer P of a tensor and all its consumers C. Dividing P's output channels by s and
multiplying the matching input columns of C by s leaves the block's function as it was (AWQ, arXiv 2306.00978,
section 3.2), provided that the operations between P and C are linear in those channels. To test that, a random s is
folded on a float64 copy of the block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantkit.errors import NumericalError
from quantkit.structure.trace import first_output, matrix

PROOF_TOKENS = 32
Form = Literal["gamma", "one_plus_gamma", "rows"]


@dataclass(frozen=True, eq=False)
class ScalingGroup:
    """A producer and its consumers. s has one entry per channel; form says how the producer is divided.

    consumers: linears whose input columns are multiplied. inspect: their lowest common parent ("" = the
    block), or the one consumer itself. form: "gamma" (a norm's weight and bias), "one_plus_gamma" (a norm
    that multiplies by 1 + weight), "rows" (a linear's output rows and bias). rows: LongTensor [channels], the
    producer's row of each channel; None for norms. expand: LongTensor [columns], the channel of each consumer
    column (grouped value heads); None if they are the same.
    """

    consumers: tuple[str, ...]
    producer: str
    form: Form
    rows: torch.Tensor | None
    expand: torch.Tensor | None
    inspect: str

    def __str__(self) -> str:
        how: str = self.form
        if self.rows is not None:
            how = f"{len(self.rows)} rows in {int(self.rows[0])}..{int(self.rows[-1])}"
            if self.expand is not None:
                how += f", each for {len(self.expand) // len(self.rows)} columns"
        return f"{self.producer} ({how}) -> {', '.join(self.consumers)}"


@torch.no_grad()
def fold(
    block: nn.Module, group: ScalingGroup, s: torch.Tensor, storage_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Divide the group's producer by `s` [channels] and multiply its consumers' columns by it, in place.

    storage_dtype: what the producer is stored as. A norm's new weight is rounded to it first, and the
    consumers take the quotient that it really has, so the rounding costs nothing (the bias of a producer,
    rounded too, may move by half a unit in its last place). A linear's weight is not rounded: it is still to
    be quantized. Returns the s that was folded: 1 where the norm's weight is zero or would not be a number
    any more.
    """
    producer = block.get_submodule(group.producer)
    bias: torch.Tensor | None = getattr(producer, "bias", None)
    bias = None if bias is None else bias.data
    weight = matrix(producer)
    s = s.to(weight.device)
    rounded = storage_dtype or torch.float64
    if group.form == "rows":
        assert group.rows is not None
        rows = group.rows.to(s.device)
        weight[rows] = (weight[rows] / s[:, None]).to(weight.dtype)
        if bias is not None:
            bias[rows] = (bias[rows] / s).to(rounded).to(bias.dtype)
    else:
        offset = 1.0 if group.form == "one_plus_gamma" else 0.0
        old = weight + offset
        new = (old / s - offset).to(rounded).to(weight.dtype)
        kept = new + offset
        sound = torch.isfinite(new) & (kept != 0) & (old != 0)
        s = torch.where(sound, old / kept, 1.0)
        weight.copy_(torch.where(sound, new, weight))
        if bias is not None:
            bias.copy_((bias / s).to(rounded))
    columns = s if group.expand is None else s[group.expand.to(s.device)]
    for name in group.consumers:
        matrix(block.get_submodule(name)).mul_(columns)
    return s


@torch.no_grad()
def check_invariance(
    block: nn.Module,
    hidden: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fold_callable: Callable[[nn.Module], object],
    tolerance: float,
) -> float:
    """Run the block, `fold_callable(block)`, and the block: the output's change relative to its RMS.

    NumericalError if that is not below `tolerance`; the block stays folded.
    """
    before = _output(block, hidden, args, kwargs)
    fold_callable(block)
    change = _relative(before, _output(block, hidden, args, kwargs))
    if not change < tolerance:
        raise NumericalError(
            f"folding scales moved the block's output by {change:.2g} of its RMS (limit {tolerance:g}); "
            "leave out the transform"
        )
    return change


class _Double(TorchFunctionMode):
    """Tensors that are cast to a narrower float become float64: so is a router that computes in fp32.

    New tensors have the type that is asked for, as experts may be read from a file meanwhile.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CASTS:
            func = torch.Tensor.double
        named = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and func is not torch.Tensor.view:
            args = tuple(torch.float64 if _narrow(each) else each for each in args)
            named = {key: torch.float64 if _narrow(each) else each for key, each in named.items()}
        return func(*args, **named)


_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


def _narrow(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, tensors that a block makes or casts itself are float64 too (XGLM's least float64)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(before)


class Prover:
    """A float64 copy of the block with a random input, on which candidates are tried."""

    def __init__(
        self, block: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        tensors = [*block.parameters(), *block.buffers()]
        self.block = copy.deepcopy(block, {id(t): _float64(t) for t in tensors if t.is_floating_point()})
        self.generator = torch.Generator().manual_seed(0)
        length = hidden.shape[1]
        noise = torch.randn(hidden.shape, generator=self.generator, dtype=torch.float64).to(hidden.device)
        call = map_tensors((args, kwargs), lambda t: t.double() if t.is_floating_point() else t)
        try:
            self.hidden = noise[:, :PROOF_TOKENS]
            self.args, self.kwargs = map_tensors(call, lambda t: _cut(t, length, self.hidden.shape[1]))
            self.reference = self.added()
        except (
            RuntimeError,
            ValueError,
            IndexError,
        ):  # an argument cannot be cut: that dimension means something else
            self.hidden, (self.args, self.kwargs) = noise, call
            self.reference = self.added()

    @torch.no_grad()
    def added(self) -> torch.Tensor:
        """What the block adds to its input."""
        with in_float64():
            return _output(self.block, self.hidden, self.args, self.kwargs) - self.hidden

    def change(self, group: ScalingGroup) -> float:
        """Fold a random s in [0.5, 2], compare, and put the weights back."""
        modules = [self.block.get_submodule(n) for n in (group.producer, *group.consumers)]
        touched = [p for module in modules for p in module.parameters()]
        kept = [p.detach().clone() for p in touched]
        channels = matrix(modules[0]).shape[0] if group.rows is None else len(group.rows)
        s = 0.5 + 1.5 * torch.rand(channels, generator=self.generator, dtype=torch.float64)
        fold(self.block, group, s)
        change = _relative(self.reference, self.added())
        for parameter, value in zip(touched, kept, strict=True):
            parameter.data = value
        return change


def _output(
    block: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    return first_output(block(hidden, *args, **kwargs))


def _relative(before: torch.Tensor, after: torch.Tensor) -> float:
    """RMS(after - before) / RMS(before); NaN if either is not finite."""
    return float((after - before).square().mean().sqrt() / before.square().mean().sqrt())


def _float64(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float64, still a parameter or a buffer."""
    value = tensor.detach().to(torch.float64, copy=True)
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def map_tensors(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `function` to the tensors in nested tuples, lists and mappings, which are copied."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(item, function) for item in tree)
    if isinstance(tree, MutableMapping):
        own = copy.copy(tree)
        for key, item in tree.items():
            own[key] = map_tensors(item, function)
        return own
    return tree


def _cut(tensor: torch.Tensor, length: int, kept: int) -> torch.Tensor:
    """Cut every dimension that is as long as the sequence to its first `kept` entries."""
    return tensor[tuple(slice(kept if size == length else None) for size in tensor.shape)]
