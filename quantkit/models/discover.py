"""Scaling groups of one decoder block: found by following its tensors, proved by folding.

A scaling group is a producer P of a tensor and all its consumers C. Dividing P's output channels by s and
multiplying the matching input columns of C by s leaves the block's function as it was (AWQ, arXiv 2306.00978,
section 3.2), if what lies between P and C is linear in those channels. No module name is looked at: which
linears share an input and which norm made it is read off one forward, every pairing the shapes allow is a
candidate, and a candidate counts only if folding a random s does not move the output of a float64 copy of the
block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantkit.errors import NumericalError

PROOF_TOKENS = 32
PROOF_TOLERANCE = 1e-5  # relative change of what the block adds to its input; HF's RMSNorm goes through fp32
HEAD_DIMS = (256, 128, 96, 80, 64, 32, 16, 8)  # tried when neither block nor config names one


@dataclass(frozen=True)
class Trace:
    """What one forward of a block has shown. Names are module names inside the block.

    stages: linears that read the same tensor, in the order of execution. calls: every call of a linear, in
    order. norms: stage -> the norm whose output it reads. output_of: submodule -> the linear inside it whose
    output it returns unchanged (alone, or first in a tuple of None); of two nested ones the inner comes
    first.
    """

    stages: tuple[tuple[str, ...], ...]
    calls: tuple[str, ...]
    norms: dict[tuple[str, ...], str]
    output_of: dict[str, str]


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
    form: Literal["gamma", "one_plus_gamma", "rows"]
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


def is_linear(module: nn.Module) -> bool:
    """A linear layer: nn.Linear, transformers' Conv1D, or a module that says so by `is_linear = True`."""
    return isinstance(module, (nn.Linear, Conv1D)) or getattr(module, "is_linear", False)


def is_norm(module: nn.Module) -> bool:
    """A module that may scale channels: all it has is a vector `weight` and perhaps a vector `bias`."""
    parameters = dict(module.named_parameters())
    named = set(parameters) in ({"weight"}, {"weight", "bias"})
    return named and not is_linear(module) and all(p.dim() == 1 for p in parameters.values())


def matrix(linear: nn.Module) -> torch.Tensor:
    """The weight as [out, in], sharing memory with the parameter (Conv1D stores [in, out])."""
    return linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data


@torch.no_grad()
def trace(block: nn.Module, hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Trace:
    """Run `block(hidden, *args, **kwargs)` once and see which tensor goes where.

    The block is in eval mode, and the call has no KV cache.
    """
    stages: dict[tuple, list[str]] = {}
    norms: dict[tuple, str] = {}
    calls: list[str] = []
    made: dict[str, tuple[torch.Tensor, int]] = {}  # linear -> its output and the version it had then
    output_of: dict[str, str] = {}
    alive: list[
        torch.Tensor
    ] = []  # a tensor that died would lend its memory, and so its identity, to another

    def reads(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            alive.append(x)
            if name not in calls:
                stages.setdefault(_identity(x), []).append(name)
            calls.append(name)

        return hook

    def makes(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            made[name] = (out, _version(out))

        return hook

    def normalises(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            alive.append(out)
            norms[_identity(out)] = name

        return hook

    def returns(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            if isinstance(out, tuple) and out and all(item is None for item in out[1:]):
                out = out[0]
            for linear, (tensor, version) in made.items():
                if out is tensor and _version(tensor) == version and linear.startswith(f"{name}."):
                    output_of[name] = linear

        return hook

    handles = []
    for name, module in block.named_modules():
        if is_linear(module):
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
    by_stage = {tuple(names): norms[key] for key, names in stages.items() if key in norms}
    return Trace(tuple(tuple(names) for names in stages.values()), tuple(calls), by_stage, output_of)


def _identity(x: torch.Tensor) -> tuple:
    """Equal for two living tensors exactly if they are the same rows in the same memory, not rewritten."""
    layout = (x.numel(), x.shape[-1]) if x.is_contiguous() else (tuple(x.shape), x.stride())
    return x.data_ptr(), _version(x), x.dtype, layout


def _version(x: torch.Tensor) -> int:
    """Counts writes in place; tensors made in inference mode do not count."""
    return 0 if x.is_inference() else x._version


def discover(
    block: nn.Module, hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]
) -> tuple[list[ScalingGroup], list[tuple[str, str]]]:
    """All scaling groups of `block`, at most one per set of consumers, and what was refused with the reason.

    (hidden, args, kwargs): a captured call without a KV cache; of `hidden` only shape and device are used.
    The block, which must be in eval mode, and the global random state are left as they are. Cost: a float64
    copy of the block, and one forward of it on at most 32 tokens per candidate (4 for Llama, about 15 for
    GPT-NeoX, whose MLP has no pair to find).
    """
    prover = _Prover(block, hidden, args, kwargs)
    seen = trace(prover.block, prover.hidden, prover.args, prover.kwargs)
    groups: list[ScalingGroup] = []
    refused: list[tuple[str, str]] = []
    for stage in seen.stages:
        repeated = [n for n in stage if seen.calls.count(n) > 1]
        if repeated:
            refused.append((f"? -> {', '.join(stage)}", f"{', '.join(repeated)} runs more than once"))
            continue
        for group in _candidates(prover.block, seen, stage):
            change = prover.change(group)
            if change < PROOF_TOLERANCE:
                groups.append(group)
                break
            refused.append(
                (str(group), f"folding moves the block's output by {change:.2g} of what the block adds")
            )
    return groups, refused


def _candidates(block: nn.Module, seen: Trace, stage: tuple[str, ...]) -> Iterator[ScalingGroup]:
    """Every pairing that the shapes allow for one stage, the likeliest first."""
    columns = matrix(block.get_submodule(stage[0])).shape[1]
    inspect = _common_parent(stage)
    if stage in seen.norms:
        producer = seen.norms[stage]
        if block.get_submodule(producer).weight.numel() == columns:
            for form in ("gamma", "one_plus_gamma"):
                yield ScalingGroup(stage, producer, form, None, None, inspect)
        return
    head_dims = _head_dims(block)
    for producer in reversed(seen.calls[: seen.calls.index(stage[0])]):
        if seen.calls.count(producer) == 1:
            for rows, expand in _layouts(matrix(block.get_submodule(producer)).shape[0], columns, head_dims):
                yield ScalingGroup(stage, producer, "rows", rows, expand, inspect)


def _layouts(
    out: int, columns: int, head_dims: list[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(rows, expand) of a producer with `out` rows that may feed `columns` columns through n channels.

    n = out: the whole producer. Else a part of a fused one: n = columns (gate and up; q, k, v with as many
    heads), or out = columns + 2 n (q, k, v with fewer value heads), as the last n rows (q, k, v or gate, up
    one after the other), the end of each head's rows (GPT-NeoX [head, 3, d], Falcon [group, heads + 2, d]),
    or the first n rows. n < columns: heads share channels.
    """
    every = torch.arange(out)
    spare = out - columns
    for n in dict.fromkeys((out, spare // 2 if spare % 2 == 0 else 0, columns)):
        if not 0 < n <= out or columns % n:
            continue
        dims = [d for d in head_dims if n % d == 0]
        repeats = columns // n
        expands = {d: _shared(n, repeats, d) for d in dims} if repeats > 1 else {0: None}
        yield from ((every[-n:], expand) for expand in expands.values())
        if n == out:
            continue
        for d in dims:
            if n > d and out % (n // d) == 0:
                ends = every.view(n // d, -1)[:, -d:].flatten()  # (heads, rows of a head) -> (heads * d)
                yield ends, expands.get(d)
        yield from ((every[:n], expand) for expand in expands.values())


def _shared(channels: int, repeats: int, head_dim: int) -> torch.Tensor:
    """Column (head, d) -> channel (head // repeats, d): [channels * repeats]."""
    heads = torch.arange(channels).view(-1, 1, head_dim)
    return heads.expand(-1, repeats, -1).flatten()  # (value heads, repeats, d) -> (columns)


def _head_dims(block: nn.Module) -> list[int]:
    """Sizes of a head that the block's modules and their configs name; the usual ones if there is none."""
    found: dict[int, None] = {}
    for module in block.modules():
        config = getattr(module, "config", None)
        for owner in (module, config):
            for name in ("head_dim", "head_size", "v_head_dim"):
                size = getattr(owner, name, None)
                if isinstance(size, int) and size > 0:
                    found[size] = None
        heads, width = (getattr(config, n, None) for n in ("num_attention_heads", "hidden_size"))
        if heads and width:
            found[width // heads] = None
    return list(found or HEAD_DIMS)


def _common_parent(names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return names[0]
    common: list[str] = []
    for parts in zip(*(n.split(".")[:-1] for n in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


class _Prover:
    """A float64 copy of the block with a random input, on which candidates are tried."""

    def __init__(self, block: nn.Module, hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        tensors = [*block.parameters(), *block.buffers()]
        self.block = copy.deepcopy(block, {id(t): _float64(t) for t in tensors if t.is_floating_point()})
        self.generator = torch.Generator().manual_seed(0)
        length = hidden.shape[1]
        noise = torch.randn(hidden.shape, generator=self.generator, dtype=torch.float64).to(hidden.device)
        call = _map_tensors((args, kwargs), lambda t: t.double() if t.is_floating_point() else t)
        try:
            self.hidden = noise[:, :PROOF_TOKENS]
            self.args, self.kwargs = _map_tensors(call, lambda t: _cut(t, length, self.hidden.shape[1]))
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
        return _output(self.block, self.hidden, self.args, self.kwargs) - self.hidden

    def change(self, group: ScalingGroup) -> float:
        """Fold a random s in [0.5, 2], compare, and put the weights back."""
        modules = [self.block.get_submodule(n) for n in (group.producer, *group.consumers)]
        touched = [p for module in modules for p in module.parameters()]
        kept = [p.detach().clone() for p in touched]
        channels = modules[0].weight.shape[0] if group.rows is None else len(group.rows)
        s = 0.5 + 1.5 * torch.rand(channels, generator=self.generator, dtype=torch.float64)
        fold(self.block, group, s)
        change = _relative(self.reference, self.added())
        for parameter, value in zip(touched, kept, strict=True):
            parameter.data = value
        return change


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
    bias = None if getattr(producer, "bias", None) is None else producer.bias.data
    s = s.to(producer.weight.device)
    rounded = storage_dtype or torch.float64
    if group.form == "rows":
        weight, rows = matrix(producer), group.rows.to(s.device)
        weight[rows] = (weight[rows] / s[:, None]).to(weight.dtype)
        if bias is not None:
            bias[rows] = (bias[rows] / s).to(rounded).to(bias.dtype)
    else:
        weight = producer.weight.data
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
    args: tuple,
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


def _output(block: nn.Module, hidden: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    out = block(hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def _relative(before: torch.Tensor, after: torch.Tensor) -> float:
    """RMS(after - before) / RMS(before); NaN if nothing can be said."""
    return float((after - before).square().mean().sqrt() / before.square().mean().sqrt())


def _float64(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float64 that stays what it was, parameter or buffer."""
    value = tensor.detach().to(torch.float64, copy=True)
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def _map_tensors(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `function` to the tensors in nested tuples, lists and dicts."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map_tensors(item, function) for item in tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(item, function) for key, item in tree.items()}
    return tree


def _cut(tensor: torch.Tensor, length: int, kept: int) -> torch.Tensor:
    """Every dimension as long as the sequence, cut to its first `kept` entries."""
    return tensor[tuple(slice(kept if size == length else None) for size in tensor.shape)]
