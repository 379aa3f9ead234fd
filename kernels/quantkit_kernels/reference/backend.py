"""The backend "reference": the plain-torch twin of every kernel, on any device, on the stored tensors themselves."""

from __future__ import annotations

import torch

from quantkit_kernels.backend import Backend, Call
from quantkit_kernels.ops import wna16_linear
from quantkit_kernels.stored import Layout, Spec, Stored


class ReferenceBackend(Backend):
    """Dequantizes the weight at every call. Takes every number, group size and float type of activations."""

    name = "reference"
    dtypes = None
    keeps_stored = True

    def _refuses(self, spec: Spec, device: torch.device) -> str | None:
        return None

    def _prepare(self, stored: Stored, dtype: torch.dtype) -> Layout:
        return Layout(stored.tensors(), stored.spec, {})

    def linear(self, layout: Layout, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tensors, spec = layout.tensors, layout.spec
        stored = (tensors["packed"], tensors["scale"], tensors.get("zero_packed"))
        number = "" if spec.integers else spec.number
        return wna16_linear(x, *stored, bias, spec.bits, spec.group_size, spec.n, spec.k, number)

    def bind(self, layout: Layout, dtype: torch.dtype) -> Call:
        """As in `Backend`, computed in the type of x."""
        linear = self.linear
        return lambda x, bias: linear(layout, x, bias)

    def restore(self, layout: Layout) -> Stored:
        tensors = layout.tensors
        parts = (tensors["packed"], tensors["scale"], tensors.get("zero_packed"))
        return Stored(*parts, layout.spec, divisor=tensors.get("divisor"))
