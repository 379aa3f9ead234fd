"""`QuantLinear`: a packed linear layer. It holds tensors and a backend, and a forward is one call of a bound object."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import quantkit_kernels
import torch
from quantkit_kernels import Call, InputRange, Layout, Spec, Stored
from quantkit_kernels.backends import ENVIRONMENT
from quantkit_kernels.cpu import layout as native
from quantkit_kernels.cpu import library
from torch import nn
from torch.compiler import is_compiling

from quantkit.errors import BackendError
from quantkit.formats.registry import DEFAULT, codec
from quantkit.numerics.inputs import InputScale, round_inputs
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Grid, Scheme


class QuantLinear(nn.Module):
    """y = x W^T + bias with a packed W [N, K], x rounded first if the scheme says so.

    Not an nn.Linear: there is no float `weight`. Its buffers are the tensors of a file format until `prepare` builds
    the layout of a backend, which replaces those of the weight; layouts are not in the state dict. bias: Parameter [N]
    or None. x [..., K] of any float dtype; y has x's dtype. Gradients reach x, as if it was not rounded, and the bias;
    codes and scales get none. ordered: its columns are kept sorted by group, and the inputs are gathered once,
    before they are multiplied.
    """

    replaces: type[nn.Module] = nn.Linear  # the class of the dense layer that `dequantize` puts back
    bias: nn.Parameter | None
    _order: torch.Tensor | None = None  # of its columns, once it was needed
    _call: Call | None = None  # the product on the layout; holds addresses, so a copy makes its own

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool,
        scale_dtype: torch.dtype,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        file_format: str = DEFAULT,
        ordered: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.file_format = file_format
        format_ = codec(file_format)
        dtypes = format_.dtypes(scheme)
        for leaf, shape in format_.shapes(out_features, in_features, scheme).items():
            self.register_buffer(leaf, torch.empty(shape, dtype=dtypes[leaf] or scale_dtype, device=device))
        if ordered and format_.order:
            order = torch.empty(in_features, dtype=dtypes[format_.order], device=device)
            self.register_buffer(format_.order, order)
        self._leaves = tuple(self._buffers)  # of the file; none once a backend has its layout
        shift = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None
        self.register_parameter("bias", shift)
        self.backend = "reference"
        grid, n, k = scheme.weights, out_features, in_features
        self.spec = Spec(grid.number.name, grid.bits, grid.group(k), grid.symmetric, n, k)
        self.prepared: tuple[str, ...] = ()  # tensors of a backend's layout; then nothing stored is left
        self.dtype: torch.dtype | None = None  # of the activations the layout was built for
        self._facts: dict[str, Any] = {}  # the plain values of that layout

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        file_format: str = DEFAULT,
        inputs: Grid | None = None,
        input_range: InputScale | None = None,
    ) -> QuantLinear:
        """A layer from codes in memory. inputs: their grid, input_range: theirs if the grid is not dynamic."""
        n, k = weight.shape
        scheme, dtype = Scheme(weight.grid, inputs), weight.scale.dtype
        ordered = weight.order is not None
        module = cls(k, n, scheme, False, dtype, None, "meta", file_format, ordered)
        for leaf, tensor in codec(file_format).pack_scheme(weight, scheme, input_range).items():
            setattr(module, leaf, tensor)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its buffers by name, in the dictionary that shows replaced ones."""
        return cast("dict[str, torch.Tensor]", self._buffers)

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        """The file's tensors by name; only those beside the weight once a layout has replaced it."""
        return {leaf: self.tensors[leaf] for leaf in self._leaves}

    @property
    def qweight(self) -> torch.Tensor:
        """A tensor of the packed weight, by which adapters (peft) find the device they belong on."""
        return next(self.buffers())

    @property
    def offloaded(self) -> bool:
        """Whether the weight is kept elsewhere (on another device or on disk) until it is used."""
        return any(buffer.is_meta for buffer in self.buffers())

    @property
    def ordered(self) -> bool:
        """Whether its inputs are gathered into the order of its columns."""
        return codec(self.file_format).order in self._leaves

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """The inputs in the order in which the weight keeps its columns."""
        if self._order is None or self._order.device != x.device:
            group_of = self.leaves[str(codec(self.file_format).order)]
            self._order = group_of.long().argsort(stable=True).to(x.device)
        return x.index_select(-1, self._order)

    @property
    def compute(self) -> str:
        """How its inputs are multiplied, one of `quantkit_kernels.INPUTS`."""
        return self.spec.inputs

    def prepare(self, backend: str | None, dtype: torch.dtype, compute: str = "float") -> None:
        """Choose the backend for activations of type `dtype` and build its layout, once.

        backend: a name, "auto" or None (see `quantkit_kernels.select`). compute: overrides how the scheme's inputs are
        multiplied (`quantkit_kernels.Spec.inputs`). BackendError if a named one cannot run. A backend with a layout of
        its own frees the stored tensors: there is no second copy.
        """
        try:
            spec = self.spec.with_inputs(compute)
            name, _ = quantkit_kernels.select(spec, next(self.buffers()).device, backend, dtype)
            chosen = quantkit_kernels.backend(name)
            if compute == "float":
                spec = spec.with_inputs(self._rounded_by(name, backend, dtype))
            if name != self.backend and self.prepared:
                raise BackendError(f"this layer already runs on {self.backend!r}; load the checkpoint again")
            self.spec = spec
            self.forget()
            if name == self.backend or chosen.keeps_stored:
                return
            layout = chosen.prepare(replace(self.stored(), inputs=self._input_range()), dtype)
        except ValueError as error:
            raise BackendError(str(error)) from error
        self.backend, self.dtype = name, dtype
        apart = codec(self.file_format).apart
        for leaf in self._leaves:
            if leaf not in apart:
                delattr(self, leaf)
        self._leaves = tuple(leaf for leaf in self._leaves if leaf in apart)
        for part, tensor in layout.tensors.items():
            self.register_buffer(part, tensor, persistent=False)
        self.prepared, self._facts = tuple(layout.tensors), dict(layout.facts)

    def _rounded_by(self, name: str, backend: str | None, dtype: torch.dtype) -> str:
        """How backend `name` multiplies inputs that its kernels round as the scheme says; "float" if they do not.

        backend: as it was asked for; kernels that nobody named must pass the backend's test of these products.
        """
        grid = self.scheme.inputs
        if grid is None:
            return "float"
        by_token = grid.dynamic and grid.symmetric and grid.granularity == "token" and grid.group_size is None
        stored = not grid.dynamic and grid.granularity == "tensor"
        wanted = "float"
        if grid.number.name == "int8" and self.spec.integers and (by_token or stored):
            wanted = "int8-range"
        elif grid.number.name == "fp8_e4m3" and (by_token or stored):
            wanted = "fp8-range"
        elif grid.number.name == "fp8_e4m3" and grid.dynamic and grid.group_size == 128:
            wanted = "fp8-group"
        spec = self.spec.with_inputs(wanted)
        try:
            found = quantkit_kernels.select(spec, next(self.buffers()).device, backend, dtype)
        except quantkit_kernels.BackendMissing:
            return "float"
        return wanted if found.name == name else "float"

    def _input_range(self) -> InputRange | None:
        """The stored range of the inputs, as kernels take it."""
        found = codec(self.file_format).inputs_of(self.leaves)
        if found is None or self.spec.inputs not in ("int8-range", "fp8-range"):
            return None
        return InputRange(float(found.scale), 0 if found.zero is None else int(found.zero))

    @property
    def layout(self) -> Layout:
        """What the backend multiplies by: its own layout, or the stored tensors."""
        if not self.prepared:
            stored = codec(self.file_format).stored(self.leaves, self.spec, self.scheme)
            return Layout(stored.tensors(), self.spec, {})
        return Layout({part: self.tensors[part] for part in self.prepared}, self.spec, self._facts)

    def move_layout(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each tensor of packed bytes by place(tensor), a copy elsewhere."""
        for part in self.prepared:
            if self.tensors[part].dtype == torch.uint8:
                self.tensors[part] = place(self.tensors[part])
        self.forget()

    def stored(self) -> Stored:
        """The weight in the canonical form. BackendError if the layout does not keep all of it."""
        try:
            return quantkit_kernels.backend(self.backend).restore(self.layout)
        except quantkit_kernels.BackendMissing as error:
            raise BackendError(str(error)) from error

    def on_disk(self) -> dict[str, torch.Tensor]:
        """The tensors of the file, given back by the layout if there is one. BackendError if it cannot."""
        if not self.prepared:
            return self.leaves
        return codec(self.file_format).from_stored(self.stored(), self.scheme, self.leaves)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """The inputs as the scheme rounds them; as they are if it does not, or if the kernel rounds them itself."""
        grid = self.scheme.inputs
        if grid is None or self.spec.inputs != "float":
            return x
        rounded = round_inputs(x.detach(), grid, codec(self.file_format).inputs_of(self.leaves))
        return x + (rounded - x).detach() if x.requires_grad and torch.is_grad_enabled() else rounded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scheme.inputs is not None:
            x = self.rounded(x)
        if self.ordered:
            x = self.gathered(x)
        if not self.prepared or is_compiling():
            return self._by_op(x)
        call = self._call or self._bind()
        return call(x, self._parameters["bias"])

    def _by_op(self, x: torch.Tensor) -> torch.Tensor:
        """The product by the backend's torch op on the module's buffers, which compilers can trace."""
        backend = quantkit_kernels.backend(self.backend)
        if not self.prepared:
            return backend.linear(self.layout, x, self.bias)
        return backend.linear(self.layout, x.to(self.dtype), self.bias).to(x.dtype)

    def _bind(self) -> Call:
        """The product bound to this module's buffers, which may still be replaced."""
        assert self.dtype is not None
        self._call = quantkit_kernels.backend(self.backend).bind(self.live_layout, self.dtype)
        return self._call

    @property
    def live_layout(self) -> Layout:
        """The backend's layout over this module's buffers, which shows replaced ones."""
        return Layout(self.tensors, self.spec, self._facts)

    def forget(self) -> None:
        """Let go of a layout that was replaced."""
        self._call = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies: only this layer's part of the memory that all layers share."""
        state = self.__dict__ | {"_call": None}
        buffers = self._buffers.items()
        state["_buffers"] = {name: None if buffer is None else _cut(buffer) for name, buffer in buffers}
        return state

    def __copy__(self) -> QuantLinear:
        """Shares all tensors, as shallow copies of other modules do."""
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__ |= self.__dict__ | {"_call": None}
        return twin

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        """Apply moves between devices, but no casts of scales and layouts: the codes belong to these values."""
        kept = {name: b.dtype for name, b in self.named_buffers() if b.dtype.is_floating_point}
        before = {name: getattr(self, name) for name in kept}
        nn.Module._apply(self, fn, recurse)
        for name, dtype in kept.items():
            if getattr(self, name).dtype != dtype:
                setattr(self, name, before[name].to(getattr(self, name).device))
        self.forget()
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}, {self.backend}"
        )


def huge_pages(modules: Iterable[QuantLinear]) -> library.Arena:
    """One arena for the native layouts of all these modules: a page fault per 2 MiB, and one forward stream."""
    size = 0
    for module in modules:
        spec = module.spec
        if native.refuses(spec) is None:
            most = max(native.units_bytes(spec, kind) for kind in (native.F32, native.F8))
            size += -(-most // 64) * 64
    return library.Arena(size)


def _cut(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own length, since a pickle or a copy takes the whole storage of a view."""
    storage = tensor.untyped_storage()
    ordinary = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta
    if not ordinary or storage.nbytes() == tensor.nbytes:
        return tensor
    if not tensor.is_contiguous():
        return tensor.clone()
    start = tensor.storage_offset() * tensor.element_size()
    own = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return own.set_(storage[start : start + tensor.nbytes], 0, tensor.shape, tensor.stride())


def missing_kernels(modules: Iterable[QuantLinear], backend: str | None) -> str | None:
    """What to tell a user whose layers "auto" runs on a CPU for which the native kernels were never built, or None.

    backend: as `prepare` was given; one that was chosen by hand is no reason to say anything.
    """
    chosen = os.environ.get(ENVIRONMENT) if backend in (None, "auto") else backend
    if library.available() or chosen not in (None, "", "auto"):
        return None
    for module in modules:
        spec = module.spec
        on_cpu = not module.offloaded and all(buffer.device.type == "cpu" for buffer in module.buffers())
        if on_cpu and native.refuses(spec) is None:
            return f"the native CPU kernels are not built, so {library.SLOWER}; {library.ADVICE}"
    return None
