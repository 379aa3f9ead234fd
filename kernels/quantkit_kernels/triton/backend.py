"""The backend "triton": linears on CUDA and ROCm devices, weight-only and with inputs in 8 bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from quantkit_kernels.backend import Backend, GroupedCall, Verdict
from quantkit_kernels.stored import Layout, Spec, Stored
from quantkit_kernels.triton import scaled_layout
from quantkit_kernels.triton.configs import table
from quantkit_kernels.triton.grouped_op import stack, triton_grouped_linear
from quantkit_kernels.triton.launch import DTYPES, chip, tickets
from quantkit_kernels.triton.layout import ROWS, build, reads_by_row, restore
from quantkit_kernels.triton.op import triton_linear
from quantkit_kernels.triton.scaled_op import triton_scaled_linear
from quantkit_kernels.triton.selfcheck import verdict


class TritonBackend(Backend):
    """2 to 8 bits and FP8 in groups that are a multiple of 32, or one scale per row; W8A8 int8 and FP8."""

    name = "triton"
    inputs: ClassVar[tuple[str, ...]] = ("float", *scaled_layout.NUMBERS)
    dtypes = DTYPES

    def _refuses(self, spec: Spec, device: torch.device) -> str | None:
        return refuses(spec, device)

    def verdict(self, spec: Spec, device: torch.device, dtype: torch.dtype | None) -> Verdict:
        return verdict(spec, device, dtype)

    def _prepare(self, stored: Stored, dtype: torch.dtype) -> Layout:
        """The tensors of `scaled_layout.py`; of weight-only linears `codes`, `scales` and `zeros` of `layout.py`."""
        if stored.device.type == "cuda":
            tickets(stored.device, 0)  # makes the ring, which a captured graph may not
        if stored.spec.inputs != "float":
            return scaled_layout.build(stored)
        codes, scales, zeros = build(stored, reads_by_row(stored.device))
        tensors = {"codes": codes, "scales": scales} | ({} if zeros is None else {"zeros": zeros})
        return Layout(tensors, stored.spec, {})

    def linear(self, layout: Layout, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tensors, spec = layout.tensors, layout.spec
        codes, scales = tensors["codes"], tensors["scales"]
        if spec.inputs != "float":
            given = (tensors.get("x_scale"), tensors.get("x_zero"), tensors.get("sums"))
            return triton_scaled_linear(x, codes, scales, *given, bias, layout.facts["rows"])
        return triton_linear(
            x, codes, scales, tensors.get("zeros"), bias, spec.bits, spec.group_size, spec.n, spec.k
        )

    def bind_grouped(
        self,
        layouts: Sequence[Layout],
        bias: Callable[[int], torch.Tensor | None],
        each: int,
        dtype: torch.dtype,
    ) -> GroupedCall:
        """As in `Backend`, in one launch; with inputs in 8 bits, or as many tokens as W is written out for, one by one.

        The tensors of the layouts become parts of one tensor, without a second copy.
        """
        one_by_one = super().bind_grouped(layouts, bias, each, dtype)
        spec = layouts[0].spec
        if spec.inputs != "float" or (each > 1 and spec.n % ROWS):
            return one_by_one
        codes, scales, *zeros = stack(layouts, each)
        experts, most = len(layouts) // each, table(chip(codes.device)[0]).dequantize_from
        facts = (spec.bits, spec.group_size, each * spec.n, spec.k)

        def call(x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            if len(rows) >= most * experts or (x.requires_grad and torch.is_grad_enabled()):
                return one_by_one(x, rows, offsets)
            biases = [bias(i) for i in range(len(layouts))]
            given = x.to(dtype)
            added = None
            if any(one is not None for one in biases):
                none = given.new_zeros(spec.n)
                added = torch.stack([none if one is None else one.to(dtype) for one in biases]).view(
                    experts, -1
                )
            parts = (codes, scales, zeros[0] if zeros else None, added)
            return triton_grouped_linear(given, rows, offsets, *parts, *facts).to(x.dtype)

        return call

    def restore(self, layout: Layout) -> Stored:
        if layout.spec.inputs != "float":
            return scaled_layout.restore(layout)
        tensors = layout.tensors
        return restore(tensors["codes"], tensors["scales"], tensors.get("zeros"), layout.spec)


def refuses(spec: Spec, device: torch.device) -> str | None:
    """Why these kernels cannot run a weight on a device, or None."""
    if device.type != "cuda":
        return f"the Triton kernels run on cuda, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if spec.inputs != "float":
        return scaled_layout.refuses(spec) or (None if spec.integers else _lacks_fp8(device))
    if not spec.integers and spec.number != "fp8_e4m3":
        return f"the Triton kernels take codes that are integers or FP8, not {spec.number}"
    if spec.group_size != spec.k and spec.group_size % 32:
        return f"groups must be a multiple of 32 or a whole row, not {spec.group_size}"
    return None


def _lacks_fp8(device: torch.device) -> str | None:
    """Why a device has no products of FP8 E4M3, or None; one that is not here is taken to have them."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return "FP8 products are written for NVIDIA's E4M3"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"FP8 products need compute capability 8.9 or later, this device has {major}.{minor}"
    return None
