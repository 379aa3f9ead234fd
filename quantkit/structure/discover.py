"""Scaling groups of one decoder block: found by following its tensors, proved by folding.

One forward shows which linears share an input and which norm produced it (quantkit.structure.trace). Every pairing
that the shapes allow is a candidate. A candidate is accepted only if folding a random s leaves the output of a float64
copy of the block unchanged (quantkit.structure.fold).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from quantkit.structure.fold import Form, Prover, ScalingGroup, in_float64
from quantkit.structure.trace import Trace, matrix, trace

PROOF_TOLERANCE = 1e-5  # relative change of what the block adds to its input; HF's RMSNorm goes through fp32
HEAD_DIMS = (256, 128, 96, 80, 64, 32, 16, 8)  # tried when neither block nor config names one


def discover(
    block: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[ScalingGroup], list[tuple[str, str]]]:
    """All scaling groups of `block`, at most one per set of consumers, and what was refused with the reason.

    (hidden, args, kwargs): a captured call without a KV cache; of `hidden` only shape and device are used.
    The block, which must be in eval mode, and the global random state are left as they are. Cost: a float64
    copy of the block, and one forward of it on at most 32 tokens per candidate (4 for Llama, about 15 for
    GPT-NeoX, whose MLP has no pair to find).
    """
    prover = Prover(block, hidden, args, kwargs)
    with in_float64():
        seen = trace(prover.block, prover.hidden, prover.args, prover.kwargs)
    groups: list[ScalingGroup] = []
    refused: list[tuple[str, str]] = []
    for siblings in seen.siblings:
        repeated = [n for n in siblings if seen.calls.count(n) > 1]
        if repeated:
            refused.append((f"? -> {', '.join(siblings)}", f"{', '.join(repeated)} runs more than once"))
            continue
        for group in _candidates(prover.block, seen, siblings):
            change = prover.change(group)
            if change < PROOF_TOLERANCE:
                groups.append(group)
                break
            refused.append(
                (str(group), f"folding moves the block's output by {change:.2g} of what the block adds")
            )
    return groups, refused


def _candidates(block: nn.Module, seen: Trace, siblings: tuple[str, ...]) -> Iterator[ScalingGroup]:
    """Every pairing that the shapes allow for one set of siblings, the most likely first."""
    columns = matrix(block.get_submodule(siblings[0])).shape[1]
    inspect = _common_parent(siblings)
    if siblings in seen.norms:
        producer = seen.norms[siblings]
        if block.get_submodule(producer).get_parameter("weight").numel() == columns:
            forms: tuple[Form, ...] = ("gamma", "one_plus_gamma")
            for form in forms:
                yield ScalingGroup(siblings, producer, form, None, None, inspect)
        return
    head_dims = _head_dims(block)
    for producer in reversed(seen.calls[: seen.calls.index(siblings[0])]):
        if seen.calls.count(producer) == 1:
            for rows, expand in _layouts(matrix(block.get_submodule(producer)).shape[0], columns, head_dims):
                yield ScalingGroup(siblings, producer, "rows", rows, expand, inspect)


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
    """Head sizes that the block's modules and their configs state; the usual ones if they state none."""
    found: dict[int, None] = {}
    for module in block.modules():
        config = getattr(module, "config", None)
        for owner in (module, config):
            for name in ("head_dim", "head_size", "v_head_dim"):
                size = _attribute(owner, name)
                if isinstance(size, int) and size > 0:
                    found[size] = None
        heads, width = (_attribute(config, n) for n in ("num_attention_heads", "hidden_size"))
        if heads and width:
            found[width // heads] = None
    return list(found or HEAD_DIMS)


def _attribute(owner: object, name: str) -> Any:
    """An attribute or None; configs whose layers differ raise errors of other types for a missing one."""
    try:
        return getattr(owner, name, None)
    except (AttributeError, ValueError, RuntimeError):
        return None


def _common_parent(names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return names[0]
    common: list[str] = []
    for parts in zip(*(n.split(".")[:-1] for n in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
