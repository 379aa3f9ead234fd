"""`QuantLinear`: packed buffers, named as on disk, and one dispatch call."""

from __future__ import annotations

from collections.abc import Callable

import quantkit_kernels
import torch
from torch import nn

from quantkit.errors import BackendError
from quantkit.formats.compressed_tensors import DTYPES, pack, stored_shapes
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Scheme

_LAYOUT = "layout_"


class QuantLinear(nn.Module):
    """y = x W^T + bias with W [N, K] packed as `quantkit.formats.compressed_tensors` describes.

    Not an nn.Linear: there is no `weight`. Buffers: weight_packed, weight_scale, weight_shape,
    weight_zero_point (None
    if symmetric); bias: Parameter [N] or None. x [..., K] of any float dtype; y has x's dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool,
        scale_dtype: torch.dtype,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        for name, shape in stored_shapes(out_features, in_features, scheme).items():
            kind = DTYPES.get(name, scale_dtype)
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        if scheme.symmetric:
            self.register_buffer("weight_zero_point", None)
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None
        )
        self.backend = "reference"
        self.prepared: tuple[str, ...] = ()  # parts of a backend's layout; then nothing stored is left
        self._dtype: torch.dtype | None = None  # of the activations the layout was built for

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: torch.Tensor | None) -> QuantLinear:
        """From codes in memory."""
        n, k = weight.shape
        module = cls(k, n, weight.scheme, False, weight.scale.dtype, device="meta")
        for name, tensor in pack(weight).items():
            setattr(module, name, tensor)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module

    def prepare(self, backend: str | None, dtype: torch.dtype) -> None:
        """Choose the backend for activations of type `dtype` and build its layout, once.

        backend: a name, "auto" or None (see `quantkit_kernels.select`). BackendError if a named one cannot
        run. A backend with a layout of its own frees the stored tensors: there is no second copy, and nothing
        to save.
        """
        k, n, bits = self.in_features, self.out_features, self.scheme.bits
        group = self.scheme.group(k)
        device = self.weight_shape.device.type
        try:
            name, _ = quantkit_kernels.select(device, bits, group, self.scheme.symmetric, 1, n, k, backend)
            if name == self.backend:
                return
            if self.prepared:
                raise BackendError(f"this layer already runs on {self.backend!r}; load the checkpoint again")
            layout = quantkit_kernels.prepare(
                name, self.weight_packed, self.weight_scale, self.weight_zero_point, bits, n, k, dtype
            )
        except quantkit_kernels.BackendMissing as error:
            raise BackendError(str(error)) from error
        self.backend, self._dtype = name, dtype
        if layout is not None:
            self.prepared = tuple(layout)
            for part, tensor in layout.items():
                self.register_buffer(_LAYOUT + part, tensor, persistent=False)
            self.weight_packed = self.weight_scale = self.weight_zero_point = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.scheme.group(self.in_features)
        if self.prepared:
            layout = {part: getattr(self, _LAYOUT + part) for part in self.prepared}
            rows = x.reshape(-1, self.in_features).to(self._dtype)
            y = quantkit_kernels.run(self.backend, rows, layout, group)
            y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
            return y if self.bias is None else y + self.bias.to(x.dtype)
        return quantkit_kernels.wna16_linear(
            x,
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            self.scheme.bits,
            group,
            self.out_features,
            self.in_features,
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        """Moves go through; casts stop at scales and layouts, for which the codes were computed."""
        kept = {name: b.dtype for name, b in self.named_buffers() if b.dtype.is_floating_point}
        before = {name: getattr(self, name) for name in kept}
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            if getattr(self, name).dtype != dtype:
                setattr(self, name, before[name].to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}, {self.backend}"
        )
