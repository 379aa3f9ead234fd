"""The ops, defined once: schema, implementations per dispatch key, fake kernel for tracing.

`quantkit::wna16_linear(x, packed, scale, zero_packed, bias, bits, group_size, n, k)`
    x [..., K] float; packed int32 [N, ceil(K bits / 32)]; scale [N, K/G] float; zero_packed int32
    [ceil(N bits / 32), K/G] or None (symmetric); bias [N] or None; returns [..., N] in x's dtype.
"""

from __future__ import annotations

import torch


from quantkit_kernels.bits import words
from quantkit_kernels.reference import wna16_linear as _reference

_LIBRARY = torch.library.Library("quantkit", "DEF")
_LIBRARY.define(
    "wna16_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero_packed, Tensor? bias, "
    "int bits, int group_size, int n, int k) -> Tensor"
)
_LIBRARY.impl("wna16_linear", _reference.wna16_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("quantkit::wna16_linear", lib=_LIBRARY)
def _fake(x, packed, scale, zero_packed, bias, bits, group_size, n, k):  # noqa: ANN001, ANN202
    torch._check(x.shape[-1] == k, lambda: f"x has {x.shape[-1]} features, the weight takes {k}")
    torch._check(packed.shape[1] == words(k, bits), lambda: f"packed rows have {packed.shape[1]} words")
    return x.new_empty((*x.shape[:-1], n))


wna16_linear = torch.ops.quantkit.wna16_linear.default
