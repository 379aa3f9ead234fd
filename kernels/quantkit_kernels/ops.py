"""The torch ops of the reference: schema, implementation, fake kernel for tracing, gradient.

`quantkit::wna16_linear(x, packed, scale, zero_packed, bias, bits, group_size, n, k)`
    x [..., K] float; packed, scale and zero_packed as in `stored.py`; bias [N] or None; returns [..., N] in x's dtype,
    also under autocast (a traced graph and eager must agree).
`quantkit::wna16_dequantize(packed, scale, zero_packed, bits, group_size, n, k, dtype)`
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
_LINEAR = f"(Tensor x, Tensor packed, Tensor scale, Tensor? zero_packed, Tensor? bias, {_WEIGHT}) -> Tensor"
_DEQUANTIZE = f"(Tensor packed, Tensor scale, Tensor? zero_packed, {_WEIGHT}, ScalarType dtype) -> Tensor"
_spec = lru_cache(maxsize=4096)(Spec.integer)


def _stored(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
) -> Stored:
    """The weight, which checks that its parts fit together."""
    return Stored(packed, scale, zero_packed, _spec(bits, group_size, zero_packed is None, n, k))


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
) -> torch.Tensor:
    stored = _stored(packed, scale, zero_packed, bits, group_size, n, k)
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
) -> torch.Tensor:
    check_product(x, bias, n, k, _stored(packed, scale, zero_packed, bits, group_size, n, k).device)
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
) -> torch.Tensor:
    return reference.dequantize(_stored(packed, scale, zero_packed, bits, group_size, n, k), dtype)


def _fake_dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_float(dtype)
    _stored(packed, scale, zero_packed, bits, group_size, n, k)
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
) -> torch.Tensor:
    op: Callable[..., torch.Tensor] = torch.ops.quantkit.wna16_dequantize
    return op(packed, scale, zero_packed, bits, group_size, n, k, x.dtype)


define("wna16_dequantize", _DEQUANTIZE, {"CompositeExplicitAutograd": _dequantize}, _fake_dequantize)
if define("wna16_linear", _LINEAR, {"CompositeExplicitAutograd": _linear}, _fake_linear):
    gradient.register("quantkit::wna16_linear", _weight_of, bias_at=4)

wna16_linear: Callable[..., torch.Tensor] = torch.ops.quantkit.wna16_linear.default
