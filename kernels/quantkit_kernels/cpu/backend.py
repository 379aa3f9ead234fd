"""The backend "cpu": the native kernels, called without torch's dispatcher when nothing observes the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack

from quantkit_kernels.backend import Backend, BackendMissing, Call, GroupedCall
from quantkit_kernels.cpu import grouped, library, ops
from quantkit_kernels.cpu import layout as native
from quantkit_kernels.reference.wna16_linear import dequantize
from quantkit_kernels.stored import INPUTS, Layout, Spec, Stored

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class CpuBackend(Backend):
    """2, 3, 4 and 8 bits, NF4, FP8 and FP4; activations as they are or rounded to int8 or FP8."""

    name = "cpu"
    inputs = INPUTS

    def _refuses(self, spec: Spec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"the native kernels run on the CPU, not on {device.type}"
        if not library.available():
            return "the native library was not built (no C++ compiler at install time)"
        try:
            library.isa()
        except RuntimeError as error:  # QUANTKIT_ISA names a path that cannot run: also "auto" must not go on
            raise BackendMissing(str(error)) from error
        if not spec.integers and spec.number not in native.TABLE_NUMBERS:
            return f"the native kernels have no table of {spec.number}"
        if not spec.integers and spec.inputs.startswith("int8"):
            return f"weights stored by table ({spec.number}) have no compute int8"
        return native.refuses(spec)

    def _prepare(self, stored: Stored, dtype: torch.dtype) -> Layout:
        layout = native.layout_of(native.pack(stored))
        if stored.inputs is None or stored.spec.inputs != "int8-range" or not stored.inputs.zero:
            return layout
        sums = dequantize(stored, torch.float32).sum(1, dtype=torch.float64)
        shift = (-stored.inputs.zero * stored.inputs.scale * sums).float()
        return Layout({**layout.tensors, "shift": shift}, layout.spec, layout.facts)

    def linear(self, layout: Layout, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return ops.linear(
            native.packed_of(layout), x, _shifted(layout, bias), ops.COMPUTES[layout.spec.inputs]
        )

    def bind(self, layout: Layout, dtype: torch.dtype) -> Call:
        """As in `Backend`. For speed, one Python frame before the C call: the checks of `ops` are repeated inline."""
        tensors, compute = layout.tensors, ops.COMPUTES[layout.spec.inputs]
        linear, plain, shifted = self.linear, ops.plain, "shift" in tensors
        # The units, their address, the product on them; replaced whole: threads share it.
        bound: tuple[torch.Tensor | None, int, Call] = (None, 0, _unbound)

        def call(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            nonlocal bound
            if (
                x.dtype is not dtype
                or type(x) not in _PLAIN
                or not x.is_cpu
                or x.is_neg()
                or (x.requires_grad and is_grad_enabled())
                or _len_torch_dispatch_stack()
                or _len_torch_function_stack()
                or peek_interpreter_stack() is not None
                or _get_tracing_state() is not None
                or (bias is not None and not plain(bias))
            ):
                return linear(layout, x.to(dtype), bias).to(x.dtype)
            units = tensors["units"]
            kept, at, product = bound
            if units is not kept or units.data_ptr() != at:
                if not plain(units):
                    return linear(layout, x, bias)
                product = ops.bind_trusting(native.packed_of(layout), dtype, compute)
                bound = units, units.data_ptr(), product
            return product(x, _shifted(layout, bias) if shifted else bias)

        return call

    def bind_grouped(
        self,
        layouts: Sequence[Layout],
        bias: Callable[[int], torch.Tensor | None],
        each: int,
        dtype: torch.dtype,
    ) -> GroupedCall:
        """As in `Backend`, in one native call. Slots that need a gradient go expert by expert."""
        compute = ops.COMPUTES[layouts[0].spec.inputs]

        def total(i: int) -> torch.Tensor | None:
            return _shifted(layouts[i], bias(i))

        bound = grouped.bind(layouts, total, each, compute)
        one_by_one = super().bind_grouped(layouts, bias, each, dtype)

        def call(x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            if x.requires_grad and is_grad_enabled():
                return one_by_one(x, rows, offsets)
            given = x.to(dtype)
            if ops.direct(given) and ops.plain(rows) and ops.plain(offsets):
                return bound(given, rows, offsets).to(x.dtype)
            weights = [native.packed_of(layout) for layout in layouts]
            biases = [total(i) for i in range(len(layouts))]
            return grouped.grouped_linear(weights, biases, each, compute, given, rows, offsets).to(x.dtype)

        return call

    def restore(self, layout: Layout) -> Stored:
        return native.unpack(native.packed_of(layout))


def _unbound(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    raise AssertionError("no units have been seen yet")


def _shifted(layout: Layout, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The bias, and what a stored zero point of the inputs takes from every output: zero times scale times row sum."""
    if "shift" not in layout.tensors:
        return bias
    shift = layout.tensors["shift"]
    return shift if bias is None else shift + bias
