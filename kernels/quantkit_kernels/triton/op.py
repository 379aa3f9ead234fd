"""`quantkit::triton_linear`: a packed linear on the storage of `layout.py`.

    x [..., K] bf16 or fp16 (the twin and the interpreter: also fp32); codes, scales, zeros as in `layout.py`, FP8
    weights by the dtype of the codes; bias [N] of any float type, added before the one rounding, or None; returns
    [..., N] in x's dtype, also under autocast.

The kernels run on CUDA devices. Elsewhere the op restores the stored tensors and runs the reference. Call it once
before capturing a CUDA graph: the first call compiles, and allocates the ring of tickets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantkit_kernels import gradient
from quantkit_kernels.reference.wna16_linear import dequantize as reference_dequantize
from quantkit_kernels.registration import define
from quantkit_kernels.stored import Spec
from quantkit_kernels.triton.configs import choose, table
from quantkit_kernels.triton.launch import (
    KINDS,
    check,
    check_dequantize,
    chip,
    dequantize,
    interpreted,
    launched,
    on,
    written_out,
)
from quantkit_kernels.triton.layout import geometry, restore, restore_fp8

_WEIGHT = "int bits, int group_size, int n, int k"
_SCHEMA = f"(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, {_WEIGHT}) -> Tensor"
_DEQUANTIZE = f"(Tensor codes, Tensor scales, Tensor? zeros, {_WEIGHT}, ScalarType dtype) -> Tensor"


def _twin(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
) -> torch.Tensor:
    w = _twin_dequantize(codes, scales, zeros, bits, group_size, n, k, x.dtype)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


def _twin_dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    if codes.dtype == torch.float8_e4m3fn:
        weight, scale = restore_fp8(codes, scales, group_size, n, k)
        return (weight.float().view(n, -1, group_size) * scale.float()[:, :, None]).view(n, k).to(dtype)
    spec = Spec.integer(bits, group_size, zeros is None, n, k)
    return reference_dequantize(restore(codes, scales, zeros, spec), dtype)


def _run(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
) -> torch.Tensor:
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if m == 0:
        return x.new_empty(*x.shape[:-1], n)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    bias = None if bias is None else bias.contiguous()
    name, processors, major = chip(x.device)
    if m >= table(name).dequantize_from or x.dtype not in (*KINDS, torch.float32):
        w = written_out(codes, scales, zeros, bits, group_size, n, k, x.dtype)
        y = torch.nn.functional.linear(rows, w, None if bias is None else bias.to(x.dtype))
    else:
        fp8 = codes.dtype == torch.float8_e4m3fn
        cut = geometry(bits, group_size, k)
        config = choose(name, bits, group_size, fp8, m, n, k, cut, processors, major)
        y = launched(rows, codes, scales, zeros, bias, bits, group_size, n, k, config)
    return y.view(*x.shape[:-1], n)


def _cuda(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    check(x, *rest)
    with on(x.device):
        if torch.is_autocast_enabled("cuda"):
            with torch.autocast("cuda", enabled=False):
                return _run(x, *rest)
        return _run(x, *rest)


def _run_interpreted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    with on(x.device):
        return _run(x, *rest)


def _other(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    check(x, *rest)
    run = _run_interpreted if interpreted() else _twin
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *rest)
    return run(x, *rest)


def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
) -> torch.Tensor:
    check(x, codes, scales, zeros, bias, bits, group_size, n, k)
    return x.new_empty((*x.shape[:-1], n))


def _dequantize(codes: torch.Tensor, *rest: Any) -> torch.Tensor:
    if codes.device.type == "cuda" or interpreted():
        return dequantize(codes, *rest)
    check_dequantize(codes, *rest)
    return _twin_dequantize(codes, *rest)


def _fake_dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_dequantize(codes, scales, zeros, bits, group_size, n, k, dtype)
    return codes.new_empty((n, k), dtype=dtype)


def _weight_of(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
) -> torch.Tensor:
    op: Callable[..., torch.Tensor] = torch.ops.quantkit.triton_dequantize
    return op(codes, scales, zeros, bits, group_size, n, k, x.dtype)


define("triton_dequantize", _DEQUANTIZE, {"CompositeExplicitAutograd": _dequantize}, _fake_dequantize)
if define("triton_linear", _SCHEMA, {"CompositeExplicitAutograd": _other, "CUDA": _cuda}, _fake):
    gradient.register("quantkit::triton_linear", _weight_of, bias_at=4)

triton_linear: Callable[..., torch.Tensor] = torch.ops.quantkit.triton_linear.default
