"""`QuantLinear`: packed buffers, named as on disk, and one dispatch call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import quantkit_kernels
import torch
from quantkit_kernels.cpu import library, ops
from torch import nn

from quantkit.errors import BackendError
from quantkit.formats.registry import codec
from quantkit.layers.siblings import LAYOUT, Siblings
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Scheme

_UNITS = LAYOUT + "units"
_NUMBERS = {name: number for number, name in enumerate(quantkit_kernels.COMPUTES)}


class QuantLinear(nn.Module):
    """y = x W^T + bias with W [N, K] packed as `quantkit.formats.compressed_tensors` describes.

    Not an nn.Linear: there is no `weight`. Buffers: weight_packed, weight_scale, weight_shape,
    weight_zero_point (None
    if symmetric); bias: Parameter [N] or None. x [..., K] of any float dtype; y has x's dtype.
    """

    siblings: Siblings | None = None  # those that run together with this one
    _bound: tuple[torch.Tensor, int, Callable[..., torch.Tensor]] | None = None  # units, address, call

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
        for name, shape in codec().shapes(out_features, in_features, scheme).items():
            kind = codec().leaves[name] or scale_dtype
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        if scheme.weights.symmetric:
            self.register_buffer("weight_zero_point", None)
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None
        )
        self.backend, self.compute = "reference", "float"
        self.prepared: tuple[str, ...] = ()  # tensors of a backend's layout; then nothing stored is left
        self._facts: dict[str, Any] = {}  # the plain values of that layout
        self._dtype: torch.dtype | None = None  # of the activations the layout was built for

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: torch.Tensor | None) -> QuantLinear:
        """From codes in memory."""
        n, k = weight.shape
        module = cls(k, n, Scheme(weight.grid), False, weight.scale.dtype, device="meta")
        for name, tensor in codec().pack(weight).items():
            setattr(module, name, tensor)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module

    def prepare(self, backend: str | None, dtype: torch.dtype, compute: str = "float") -> None:
        """Choose the backend for activations of type `dtype` and build its layout, once.

        backend: a name, "auto" or None (see `quantkit_kernels.select`). compute: see
        `quantkit_kernels.check_compute`. BackendError if a named one cannot run. A backend with a layout of its own
        frees the stored tensors: there is no second copy.
        """
        k, n, bits = self.in_features, self.out_features, self.scheme.weights.bits
        group = self.scheme.weights.group(k)
        device = self.weight_shape.device
        try:
            name, _ = quantkit_kernels.select(
                device, bits, group, self.scheme.weights.symmetric, 1, n, k, backend, dtype
            )
            quantkit_kernels.check_compute(name, compute)
            self.compute = compute
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
            for part, value in layout.items():
                if isinstance(value, torch.Tensor):
                    self.register_buffer(LAYOUT + part, value, persistent=False)
                else:
                    self._facts[part] = value
            self.prepared = tuple(part for part in layout if part not in self._facts)
            for stored in ("weight_packed", "weight_scale", "weight_zero_point"):
                delattr(self, stored)  # torch.export stumbles over buffers that are None
                setattr(self, stored, None)

    @property
    def layout(self) -> dict[str, Any]:
        """The backend's layout; empty if it runs on the stored tensors."""
        return {part: getattr(self, LAYOUT + part) for part in self.prepared} | self._facts

    @property
    def cpu_packed(self) -> Any:
        """The native layout (`quantkit_kernels.cpu.ops.Packed`), or None on another backend."""
        return ops.Packed(**self.layout) if self.backend == "cpu" else None

    def move_layout(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each tensor of the layout by place(tensor), a copy elsewhere."""
        for part in self.prepared:
            setattr(self, LAYOUT + part, place(getattr(self, LAYOUT + part)))
        self._forget()

    def stored(self) -> dict[str, torch.Tensor]:
        """The packed tensors as on disk, given back by the layout if there is one. BackendError if it cannot."""
        names = ("weight_packed", "weight_scale", "weight_zero_point")
        tensors = (self.weight_packed, self.weight_scale, self.weight_zero_point)
        if self.prepared:
            try:
                tensors = quantkit_kernels.restore(self.backend, self.layout)
            except quantkit_kernels.BackendMissing as error:
                raise BackendError(str(error)) from error
        return {n: t for n, t in zip(names, tensors, strict=True) if t is not None} | {
            "weight_shape": self.weight_shape
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias
        if self.backend != "cpu":
            y = self._with_siblings(x)
            return self._dispatched(x) if y is None else y
        if not ops.direct(x) or x.dtype is not self._dtype:
            return self._dispatched(x)
        units, bound = self._buffers[_UNITS], self._bound
        if bias is not None and not ops.plain(bias):
            return self._dispatched(x)
        if self.siblings is not None:
            y = self.siblings.run(self, x, units, bias)
            if y is not None:
                return y
        if bound is None or bound[0] is not units or bound[1] != units.data_ptr():
            if not ops.plain(units):
                return self._dispatched(x)
            self._bound = bound = units, units.data_ptr(), self.cpu_packed.bind(self._dtype)
        return bound[2](x, bias, _NUMBERS[self.compute])

    def _with_siblings(self, x: torch.Tensor) -> torch.Tensor | None:
        """The result by one op for all siblings; None if this has to run alone."""
        if self.siblings is None or not ops.unwatched(x) or x.dtype is not self._dtype:
            return None
        first = self._buffers[LAYOUT + self.prepared[0]]
        return self.siblings.run(self, x, first, self.bias) if x.device == first.device else None

    def _dispatched(self, x: torch.Tensor) -> torch.Tensor:
        """The result by the ops; what `forward` gives without torch's dispatcher where nobody looks at it."""
        group = self.scheme.weights.group(self.in_features)
        if self.prepared:
            y = quantkit_kernels.run(
                self.backend, x.to(self._dtype), self.layout, group, self.bias, self.compute
            )
            return y.to(x.dtype)
        return quantkit_kernels.wna16_linear(
            x,
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            self.scheme.weights.bits,
            group,
            self.out_features,
            self.in_features,
        )

    def _forget(self) -> None:
        """Let go of a layout that was replaced."""
        self._bound = None
        if self.siblings is not None:
            self.siblings.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Without what holds addresses; it is made anew at the next call."""
        state = self.__dict__.copy()
        state.pop("_bound", None)
        return state

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        """Moves go through; casts stop at scales and layouts, for which the codes were computed."""
        kept = {name: b.dtype for name, b in self.named_buffers() if b.dtype.is_floating_point}
        before = {name: getattr(self, name) for name in kept}
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            if getattr(self, name).dtype != dtype:
                setattr(self, name, before[name].to(getattr(self, name).device))
        self._forget()
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}, {self.backend}"
        )


def huge_pages(modules: Iterable[QuantLinear]) -> library.Arena:
    """One arena for the native layouts of all these modules: a page fault per 2 MiB, and one forward stream."""
    size = 0
    for module in modules:
        n, k, bits = module.out_features, module.in_features, module.scheme.weights.bits
        group = module.scheme.weights.group(k)
        if ops.refuses(bits, group, k) is None:
            size += -(-ops.units_bytes(bits, group, n, k, wide_scales=True) // 64) * 64
    return library.Arena(size)
