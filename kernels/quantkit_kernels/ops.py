"""The ops, defined once: schema, implementation, fake kernel for tracing.

`quantkit::wna16_linear(x, packed, scale, zero_packed, bias, bits, group_size, n, k)`
    x [..., K] float; packed int32 [N, ceil(K bits / 32)]; scale [N, K/G] float; zero_packed int32
    [ceil(N bits / 32), K/G] or None (symmetric); bias [N] or None; returns [..., N] in x's dtype, also under
    autocast (a traced graph and eager must agree).
"""

from __future__ import annotations

import torch

from quantkit_kernels.bits import words
from quantkit_kernels.reference.wna16_linear import wna16_linear as _reference

_SCHEMA = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero_packed, Tensor? bias, "
    "int bits, int group_size, int n, int k) -> Tensor"
)


def _check_shapes(x, packed, scale, zero_packed, bits: int, group_size: int, n: int, k: int) -> None:
    groups = k // group_size
    torch._check(x.shape[-1] == k, lambda: f"x has {x.shape[-1]} features, the weight takes {k}")
    for name, tensor, shape in (
        ("packed", packed, (n, words(k, bits))),
        ("scale", scale, (n, groups)),
        ("zero_packed", zero_packed, (words(n, bits), groups)),
    ):
        if tensor is not None:
            torch._check(
                tuple(tensor.shape) == shape,
                lambda name=name, tensor=tensor, shape=shape: (
                    f"{name} of a {bits}-bit [{n}, {k}] weight is {shape}, got {tuple(tensor.shape)}"
                ),
            )


def _run(x, packed, scale, zero_packed, bias, bits, group_size, n, k):
    _check_shapes(x, packed, scale, zero_packed, bits, group_size, n, k)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _reference(x, packed, scale, zero_packed, bias, bits, n, k)
    return _reference(x, packed, scale, zero_packed, bias, bits, n, k)


def _fake(x, packed, scale, zero_packed, bias, bits, group_size, n, k):
    _check_shapes(x, packed, scale, zero_packed, bits, group_size, n, k)
    return x.new_empty((*x.shape[:-1], n))


# Imported under a second name (a copy on the path), this module must not define the op again: torch refuses
# that.
if not hasattr(torch.ops.quantkit, "wna16_linear"):
    torch.library.define("quantkit::wna16_linear", _SCHEMA)
    torch.library.impl("quantkit::wna16_linear", "CompositeExplicitAutograd")(_run)
    torch.library.register_fake("quantkit::wna16_linear")(_fake)

wna16_linear = torch.ops.quantkit.wna16_linear.default
