"""`QuantLinear`: packed buffers, named as on disk, and one dispatch call."""

from __future__ import annotations

from collections.abc import Callable

import quantkit_kernels
import torch
from torch import nn

from quantkit.errors import BackendError
from quantkit.formats.compressed_tensors import pack, stored_shapes
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Scheme

_DTYPES = {"weight_packed": torch.int32, "weight_shape": torch.int64, "weight_zero_point": torch.int32}


class QuantLinear(nn.Module):
    """y = x W^T + bias with W [N, K] in the format of `quantkit.formats.compressed_tensors`.

    Not an nn.Linear: there is no `weight`. Buffers: see that module's docstring; bias [N] or None.
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
            kind = _DTYPES.get(name, scale_dtype)
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        if scheme.symmetric:
            self.weight_zero_point = None
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None
        self._runner: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._dtype: torch.dtype | None = None
        self.backend = "reference"

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: torch.Tensor | None) -> QuantLinear:
        """From codes in memory."""
        n, k = weight.shape
        module = cls(k, n, weight.scheme, bias is not None, weight.scale.dtype, None if bias is None else bias.dtype)
        for name, tensor in pack(weight).items():
            setattr(module, name, tensor)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module

    def prepare(self, backend: str | None, dtype: torch.dtype) -> None:
        """Choose the backend (BackendError if a named one cannot run) and build its layout, once.

        A backend with a layout of its own frees the stored tensors: there is no second copy.
        """
        k, n = self.in_features, self.out_features
        group = self.scheme.group(k)
        device = self.weight_packed.device.type
        try:
            choice = quantkit_kernels.select(
                device, self.scheme.bits, group, self.scheme.symmetric, 1, n, k, backend
            )
        except quantkit_kernels.BackendMissing as error:
            raise BackendError(str(error)) from error
        self.backend = choice.name
        if choice.name != "reference":
            self._runner = quantkit_kernels.prepare(
                choice.name, self.weight_packed, self.weight_scale, self.weight_zero_point, self.scheme.bits, group, n, k, dtype
            )
            self._dtype = dtype
            for name in ("weight_packed", "weight_scale", "weight_zero_point"):
                setattr(self, name, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._runner is not None:
            y = self._runner(x.reshape(-1, self.in_features).to(self._dtype))
            y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
            return y if self.bias is None else y + self.bias.to(x.dtype)
        return quantkit_kernels.wna16_linear(
            x,
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            self.scheme.bits,
            self.scheme.group(self.in_features),
            self.out_features,
            self.in_features,
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}, {self.backend}"
