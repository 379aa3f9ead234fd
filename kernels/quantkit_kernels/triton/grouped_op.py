"""`quantkit::triton_grouped_linear`: the products of all experts of a mixture, in one launch.

    x [T, K] bf16 or fp16 (the twin and the interpreter: also fp32); rows int64 [S], the row of x of each slot; offsets
    int64 [E + 1]: slots offsets[e] to offsets[e + 1] - 1 are those of expert e; codes, scales, zeros as in `layout.py`
    with a first axis of E experts; bias [E, N] of any float type or None; returns [S, N] in x's dtype. No gradient.

Offsets are not read on the host: they must ascend from 0 to S, and rows be those of x.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch

from quantkit_kernels.checks import check_part, check_slots
from quantkit_kernels.registration import define
from quantkit_kernels.stored import Layout
from quantkit_kernels.triton.configs import Config, rule
from quantkit_kernels.triton.launch import KINDS, chip, interpreted, on, plan
from quantkit_kernels.triton.layout import ROWS, check_weight, geometry, is_by_row
from quantkit_kernels.triton.op import triton_linear

_WEIGHT = "int bits, int group_size, int n, int k"
_PARTS = "Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias"
_SCHEMA = f"(Tensor x, Tensor rows, Tensor offsets, {_PARTS}, {_WEIGHT}) -> Tensor"


def config_of(bits: int, slots: int, experts: int, n: int, cut: Any, processors: int, major: int) -> Config:
    """The tile of the rule for the tokens that an expert has on average, all experts' rows together; K is not split."""
    rows = n * min(experts, slots)
    return rule(bits, max(1, -(-slots // experts)), rows, cut, processors, major)._replace(splits=1)


def _check(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
) -> None:
    if not codes.dim() or not codes.shape[0] or not scales.dim() or scales.shape[0] != codes.shape[0]:
        raise ValueError(
            f"codes and scales are those of E experts, got {list(codes.shape)} and {list(scales.shape)}"
        )
    experts, parts = codes.shape[0], [("codes", codes), ("scales", scales)]
    if zeros is not None:
        parts.append(("zeros", zeros))
        check_part("zeros", zeros, scales.shape, (scales.dtype,), codes.device)
    for name, tensor in parts:
        check_part(name, tensor, tensor.shape, (tensor.dtype,), x.device)
    check_weight(codes[0], scales[0], None if zeros is None else zeros[0], bits, group_size, n, k)
    check_slots(x, rows, offsets, experts, k)
    if x.dtype not in (*KINDS, torch.float32):
        raise TypeError(f"x must be fp32, bf16 or fp16, got {x.dtype}")
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"bias must be of a float type, got {bias.dtype}")
        check_part("bias", bias, (experts, n), (bias.dtype,), x.device)


def _run(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    config: Config | None = None,
) -> torch.Tensor:
    from quantkit_kernels.triton.grouped import grouped_kernel

    fp8, experts, slots = codes.dtype == torch.float8_e4m3fn, codes.shape[0], len(rows)
    y = x.new_empty(slots, n)
    if not slots:
        return y
    kind = None if torch.version.hip or x.device.type != "cuda" else KINDS.get(x.dtype)
    by_row, words, chunks = is_by_row(codes[0]), scales.shape[2], codes.shape[2]
    fixed = plan(x.device, bits, zeros is not None, fp8, group_size, n, k, kind, scales.dtype, by_row)
    _, processors, major = chip(x.device)
    bm, bn, unroll, _, warps, stages = config or config_of(
        bits, slots, experts, n, geometry(bits, group_size, k), processors, major
    )
    x = x if x.stride(1) == 1 else x.contiguous()
    tiles = -(-slots // bm) + min(experts, slots)  # every expert may leave a tile that is not full
    grouped_kernel[(tiles, -(-n // bn))](
        x,
        codes.view(torch.uint8),
        scales.view(torch.int32),
        (scales if zeros is None else zeros).view(torch.int32),
        y if bias is None else bias,
        y,
        rows,
        offsets,
        experts,
        n,
        k,
        x.stride(0),
        words,
        chunks,
        chunks // unroll,
        **fixed,
        BM=bm,
        BN=bn,
        UNROLL=unroll,
        HAS_BIAS=bias is not None,
        STAGES=stages,
        EP=1 << (experts - 1).bit_length(),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    return y


def _twin(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    *weight: int,
) -> torch.Tensor:
    """Expert by expert through the linear op."""
    y = x.new_empty(len(rows), weight[2])
    for e, (start, stop) in enumerate(pairwise(offsets.tolist())):
        if start < stop:
            parts = (
                codes[e],
                scales[e],
                None if zeros is None else zeros[e],
                None if bias is None else bias[e],
            )
            y[start:stop] = triton_linear(x[rows[start:stop]], *parts, *weight)
    return y


def _cuda(*arguments: Any) -> torch.Tensor:
    _check(*arguments)
    with on(arguments[0].device):
        return _run(*arguments)


def _other(*arguments: Any) -> torch.Tensor:
    _check(*arguments)
    if interpreted():
        with on(arguments[0].device):
            return _run(*arguments)
    return _twin(*arguments)


def _fake(x: torch.Tensor, rows: torch.Tensor, *rest: Any) -> torch.Tensor:
    _check(x, rows, *rest)
    return x.new_empty(len(rows), rest[-2])


define("triton_grouped_linear", _SCHEMA, {"CompositeExplicitAutograd": _other, "CUDA": _cuda}, _fake)

triton_grouped_linear: Callable[..., torch.Tensor] = torch.ops.quantkit.triton_grouped_linear.default


def stack(layouts: Sequence[Layout], each: int) -> tuple[torch.Tensor, ...]:
    """(codes, scales[, zeros]) of all experts as one tensor each, [E, each N'/64, ...].

    The layouts' own tensors become parts of them, so that nothing is kept twice. Weights of an expert form one weight,
    which takes N to be a multiple of 64.
    """
    if each > 1 and layouts[0].spec.n % ROWS:
        raise ValueError(
            f"{each} weights of {layouts[0].spec.n} rows are no weight: {ROWS} does not divide them"
        )
    found = []
    for name in layouts[0].tensors:
        parts = [layout.tensors[name] for layout in layouts]
        whole = torch.stack(parts)
        for layout, part in zip(layouts, whole, strict=True):
            cast("MutableMapping[str, torch.Tensor]", layout.tensors)[name] = part
        found.append(whole.view(-1, each * parts[0].shape[0], *parts[0].shape[1:]))
    return tuple(found)
