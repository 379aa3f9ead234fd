"""The torch ops of the reference: schema, implementation, fake kernel for tracing, gradient.

`quantkit::wna16_linear(x, packed, scale, zero_packed, bias, bits, group_size, n, k, table="")`
    x [..., K] float; packed, scale and zero_packed as in `stored.py`; bias [N] or None; returns [..., N] in x's dtype,
    also under autocast (a traced graph and eager must agree). table: the number whose codes they are, if not integers.
`quantkit::wna16_dequantize(packed, scale, zero_packed, bits, group_size, n, k, dtype, table="")`
    the weight [N, K].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from quantkit_kernels import gradient
from quantkit_kernels.checks import check_float, check_product
from quantkit_kernels.reference import wna16_linear as reference
from quantkit_kernels.registration import define
from quantkit_kernels.stored import Spec, Stored

_WEIGHT = "int bits, int group_size, int n, int k"
_TABLE = 'str table=""'
_LINEAR = f"(Tensor x, Tensor packed, Tensor scale, Tensor? zero_packed, Tensor? bias, {_WEIGHT}, {_TABLE}) -> Tensor"
_DEQUANTIZE = (
    f"(Tensor packed, Tensor scale, Tensor? zero_packed, {_WEIGHT}, ScalarType dtype, {_TABLE}) -> Tensor"
)


@lru_cache(maxsize=4096)
def _spec(bits: int, group_size: int, symmetric: bool, n: int, k: int, table: str) -> Spec:
    return Spec(table or f"int{bits}", bits, group_size, symmetric, n, k)


def _stored(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    table: str = "",
) -> Stored:
    """The weight, which checks that its parts fit together."""
    return Stored(packed, scale, zero_packed, _spec(bits, group_size, zero_packed is None, n, k, table))


def _linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    table: str = "",
) -> torch.Tensor:
    stored = _stored(packed, scale, zero_packed, bits, group_size, n, k, table)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return reference.wna16_linear(x, stored, bias)
    return reference.wna16_linear(x, stored, bias)


def _fake_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    table: str = "",
) -> torch.Tensor:
    check_product(x, bias, n, k, _stored(packed, scale, zero_packed, bits, group_size, n, k, table).device)
    return x.new_empty((*x.shape[:-1], n))


def _dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    table: str = "",
) -> torch.Tensor:
    return reference.dequantize(_stored(packed, scale, zero_packed, bits, group_size, n, k, table), dtype)


def _fake_dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    table: str = "",
) -> torch.Tensor:
    check_float(dtype)
    _stored(packed, scale, zero_packed, bits, group_size, n, k, table)
    return packed.new_empty((n, k), dtype=dtype)


def _weight_of(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    table: str = "",
) -> torch.Tensor:
    op: Callable[..., torch.Tensor] = torch.ops.quantkit.wna16_dequantize
    return op(packed, scale, zero_packed, bits, group_size, n, k, x.dtype, table)


define("wna16_dequantize", _DEQUANTIZE, {"CompositeExplicitAutograd": _dequantize}, _fake_dequantize)
if define("wna16_linear", _LINEAR, {"CompositeExplicitAutograd": _linear}, _fake_linear):
    gradient.register("quantkit::wna16_linear", _weight_of, bias_at=4)

wna16_linear: Callable[..., torch.Tensor] = torch.ops.quantkit.wna16_linear.default
