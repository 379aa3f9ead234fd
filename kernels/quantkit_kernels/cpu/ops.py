"""The torch op on the native layout, its gradient, and direct calls that bypass torch's dispatcher.

`quantkit::cpu_linear(x, units, bias, bits, group_size, n, k, symmetric, compute, scale_factor, scale_type, table,
input_scale, input_zero)`
    x [..., K] fp32, bf16 or fp16; units uint8 [B] from `layout.pack`; bias fp32 [N] or None; returns [..., N] in
    x's dtype. compute: 0 float, 1 int8 activations per token and group, 2 per token, 3 as float, but fp32 activations
    keep 15 bits, 4 int8 of a range (`Spec.inputs`): a stored one has input_scale and input_zero, and bias holds what
    input_zero adds to y, 5 the same in FP8, 6 FP8 per token and 128 columns. scale_type: 0 fp16, 1 fp32, 2 FP8.
    table: 0, or 1 NF4, 2 FP8 E4M3 and 3 FP4 E2M1, whose codes index a table (`layout.pack_codes`); they take no int8.
`quantkit::cpu_dequantize(units, bits, group_size, n, k, symmetric, scale_factor, scale_type, table, dtype)`
    the weight [N, K] in fp32, bf16 or fp16.

For a small weight, torch's dispatcher and Python cost more than the product. `linear` bypasses both where nothing
observes the call, and `bind` does that for one weight, checked once.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from quantkit_kernels import gradient
from quantkit_kernels.checks import check_features, check_float
from quantkit_kernels.cpu import library
from quantkit_kernels.cpu.layout import (
    F8,
    F16,
    F32,
    TABLE_NUMBERS,
    Packed,
    check_bias,
    check_units,
    refuses,
    table_number,
    units_bytes,
    unpack,
)
from quantkit_kernels.reference.wna16_linear import dequantize as reference_dequantize
from quantkit_kernels.registration import define
from quantkit_kernels.stored import InputRange, Spec

FLOAT, INT8_GROUP, INT8_TOKEN, HALVES, INT8_RANGE, FP8_RANGE, FP8_GROUP = range(7)  # qk::Compute
COMPUTES = {
    "float": FLOAT,
    "int8": INT8_GROUP,
    "int8-token": INT8_TOKEN,
    "int8-range": INT8_RANGE,
    "fp8-range": FP8_RANGE,
    "fp8-group": FP8_GROUP,
}  # of `Spec.inputs`
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_TABLE_NAMES = {number: name for name, number in TABLE_NUMBERS.items()}
_WEIGHT = "int bits, int group_size, int n, int k, bool symmetric"
_LINEAR = (
    f"(Tensor x, Tensor units, Tensor? bias, {_WEIGHT}, int compute, float scale_factor, int scale_type, "
    "int table=0, float input_scale=0, int input_zero=0) -> Tensor"
)
_DEQUANTIZE = (
    f"(Tensor units, {_WEIGHT}, float scale_factor, int scale_type, int table, ScalarType dtype) -> Tensor"
)

Call = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def linear(
    weight: Packed, x: torch.Tensor, bias: torch.Tensor | None = None, compute: int = FLOAT
) -> torch.Tensor:
    """x [..., K] W^T + bias, [..., N] in x's dtype: `cpu_linear`, called directly when nothing observes the call."""
    spec, units = weight.spec, weight.units
    bias = None if bias is None else bias.float()
    past = direct(x) and plain(units) and (bias is None or plain(bias))
    call: Callable[..., torch.Tensor] = _run if past else cpu_linear
    facts = (spec.bits, spec.group_size, spec.n, spec.k, spec.symmetric)
    kind = (weight.scale_factor, weight.scale_type, table_number(spec), *(weight.inputs or ()))
    return call(x, units, bias, *facts, compute, *kind)


def bind(weight: Packed, dtype: torch.dtype, compute: int = FLOAT) -> Call:
    """`cpu_linear` on one weight: call(x, bias) -> y for `plain` x of `dtype` and `plain` bias of any float type.

    The weight is checked here, x and bias by the calls. Calls must be `direct`, and the units must stay alive at the
    same address.
    """
    product = bind_trusting(weight, dtype, compute)

    def call(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        for name, tensor in (("x", x), ("bias", bias)):
            if tensor is not None and not plain(tensor):
                raise ValueError(
                    f"{name} must be an ordinary tensor on the CPU that needs no gradient, got {type(tensor).__name__} "
                    f"on {tensor.device}"
                )
        if x.dtype is not dtype:
            raise ValueError(f"x must be {dtype}, for which the weight was bound, got {x.dtype}")
        return product(x, bias)

    return call


def bind_trusting(weight: Packed, dtype: torch.dtype, compute: int = FLOAT) -> Call:
    """`bind` for the backend, whose calls have looked at type and place of x and bias: these check only sizes."""
    check_units(weight.units, weight.spec, weight.scale_type)
    return _bound(
        library.required(),
        weight.units.data_ptr(),
        dtype,
        weight.spec,
        compute,
        weight.scale_factor,
        weight.scale_type,
        *(weight.inputs or ()),
    )


@functools.lru_cache(maxsize=4096)
def spec_of(bits: int, group_size: int, n: int, k: int, symmetric: bool, table: int) -> Spec:
    """The spec of a weight; ValueError if the native code does not take it."""
    if table and table not in _TABLE_NAMES:
        raise ValueError(f"unknown table {table}; known: 0 (integers), 1 (NF4), 2 (FP8 E4M3), 3 (FP4 E2M1)")
    return Spec(_TABLE_NAMES.get(table, f"int{bits}"), bits, group_size, symmetric, n, k)


def _run(
    x: torch.Tensor,
    units: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    symmetric: bool,
    compute: int,
    scale_factor: float,
    scale_type: int,
    table: int = 0,
    input_scale: float = 0.0,
    input_zero: int = 0,
) -> torch.Tensor:
    if bias is not None and bias.dtype is not torch.float32:
        check_bias(bias, n)
    facts = (
        bits,
        group_size,
        n,
        k,
        symmetric,
        compute,
        scale_factor,
        scale_type,
        table,
        input_scale,
        input_zero,
    )
    call: Call | None = None
    if units.dtype is torch.uint8 and units.is_cpu and units.is_contiguous():
        call = _bound_flat(library.required(), units.data_ptr(), units.numel(), x.dtype, *facts)
    if call is None:
        check_units(units, spec_of(bits, group_size, n, k, symmetric, table), scale_type)
        raise AssertionError("units that fit were not bound")
    return call(x, bias)


@functools.lru_cache(maxsize=4096)
def _bound_flat(
    c: ctypes.CDLL,
    at: int,
    size: int,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    symmetric: bool,
    compute: int,
    scale_factor: float,
    scale_type: int,
    table: int,
    input_scale: float,
    input_zero: int,
) -> Call | None:
    """`_bound` for units of a given size at an address; None if a weight of this kind has another size."""
    spec = spec_of(bits, group_size, n, k, symmetric, table)
    if refuses(spec) or scale_type not in (F16, F32, F8) or size != units_bytes(spec, scale_type):
        return None
    return _bound(c, at, dtype, spec, compute, scale_factor, scale_type, input_scale, input_zero)


@functools.lru_cache(maxsize=4096)
def _bound(
    c: ctypes.CDLL,
    at: int,
    dtype: torch.dtype,
    spec: Spec,
    compute: int,
    scale_factor: float,
    scale_type: int,
    input_scale: float = 0.0,
    input_zero: int = 0,
) -> Call:
    """call(x, bias) on the units at an address, which were checked. Cached: the C struct takes longer than the call."""
    check_kind(dtype, compute, spec)
    if input_scale or input_zero:
        InputRange(input_scale, input_zero).check()
    kind, n, k = TYPES[dtype], spec.n, spec.k
    weight = (scale_factor, n, k, spec.group_size, spec.bits, scale_type, table_number(spec))
    numbers = (*weight, input_scale, input_zero)
    # Without argtypes ctypes converts nothing, which is half the cost of the call. A Python int is a C int then.
    native, pointer, threads = c["qk_linear"], ctypes.c_void_p, torch.get_num_threads
    bare = ctypes.byref(library.Weight(at, None, *numbers))
    # Of the call before. Each is one tuple that is read and replaced whole: threads share them.
    shapes: tuple[torch.Size, tuple[int, ...], ctypes.c_int64] = (
        torch.Size(),
        (),
        ctypes.c_int64(),
    )  # of x, y; M
    biased = 0, bare  # address of the bias, struct

    def call(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        nonlocal shapes, biased
        shape, sizes, m = shapes
        if x.shape != shape or not shape:
            shape = x.shape
            check_features(shape, k)
            shapes = shape, sizes, m = shape, (*shape[:-1], n), ctypes.c_int64(x.numel() // k)
        if not x.is_contiguous():
            x = x.contiguous()
        struct = bare
        if bias is not None:
            bias = bias.float()
            check_bias(bias, n)
            there, struct = biased
            if bias.data_ptr() != there:
                there = bias.data_ptr()
                biased = there, struct = there, ctypes.byref(library.Weight(at, there, *numbers))
        y = x.new_empty(*sizes)
        status = native(
            struct, pointer(x.data_ptr()), kind, m, compute, pointer(y.data_ptr()), kind, threads()
        )
        if status:
            raise failure(status)
        return y

    return call


def run(
    x: torch.Tensor, weight: Packed, compute: int, y: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """y [M, N] = x [M, K] W^T + bias, both contiguous and of one dtype: the bare C call, into memory that is there."""
    spec = weight.spec
    check_kind(x.dtype, compute, spec)
    check_features(x.shape, spec.k)
    m = x.shape[0]
    fits = x.dim() == 2 and y.shape == (m, spec.n) and y.dtype == x.dtype
    if not fits or not (x.is_cpu and y.is_cpu and x.is_contiguous() and y.is_contiguous()):
        raise ValueError(
            f"x and y are contiguous [M, {spec.k}] and [M, {spec.n}] of one type on the CPU, got {x.dtype} "
            f"{list(x.shape)} and {y.dtype} {list(y.shape)}"
        )
    kind, struct = TYPES[x.dtype], weight.weight(bias)
    status = library.required().qk_linear(
        struct, x.data_ptr(), kind, m, compute, y.data_ptr(), kind, torch.get_num_threads()
    )
    if status:
        raise failure(status)


def check_kind(dtype: torch.dtype, compute: int, spec: Spec) -> None:
    if dtype not in TYPES:
        raise TypeError(f"x must be fp32, bf16 or fp16, got {dtype}")
    if compute not in (*COMPUTES.values(), HALVES):
        known = ", ".join(f"{number} ({name})" for name, number in COMPUTES.items())
        raise ValueError(f"unknown compute {compute}; known: {known}, {HALVES} (halves)")
    if not spec.integers and compute in (INT8_GROUP, INT8_TOKEN, INT8_RANGE):
        raise ValueError(f"weights stored by table ({spec.number}) have no compute int8; use compute float")


def failure(status: int) -> Exception:
    library.isa()  # says so if the forced instruction set is missing
    if status == 2:
        return MemoryError("no memory for the activations of this call")
    return ValueError("the native kernels do not take these bits, this group or this table")


def plain(x: torch.Tensor) -> bool:
    """Whether a tensor is ordinary memory of the CPU that needs no gradient."""
    return type(x) in _PLAIN and x.is_cpu and not x.is_neg() and not (x.requires_grad and is_grad_enabled())


def direct(x: torch.Tensor) -> bool:
    """Whether x is `plain` and no tracer, transform or mode observes calls with it."""
    return (
        not is_compiling()
        and plain(x)
        and not _len_torch_dispatch_stack()
        and not _len_torch_function_stack()
        and peek_interpreter_stack() is None
        and _get_tracing_state() is None
    )


def _fake(
    x: torch.Tensor,
    units: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    symmetric: bool,
    compute: int,
    scale_factor: float,
    scale_type: int,
    table: int = 0,
    input_scale: float = 0.0,
    input_zero: int = 0,
) -> torch.Tensor:
    spec = spec_of(bits, group_size, n, k, symmetric, table)
    check_kind(x.dtype, compute, spec)
    check_features(x.shape, k)
    check_units(units, spec, scale_type, x.device.type)
    if bias is not None:
        check_bias(bias, n, x.device.type)
    return x.new_empty((*x.shape[:-1], n))


def _dequantize(
    units: torch.Tensor,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    symmetric: bool,
    scale_factor: float,
    scale_type: int,
    table: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_float(dtype)
    spec = spec_of(bits, group_size, n, k, symmetric, table)
    weight = Packed(units, spec, scale_factor, scale_type, torch.float32)
    return reference_dequantize(unpack(weight), dtype)


def _fake_dequantize(
    units: torch.Tensor,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    symmetric: bool,
    scale_factor: float,
    scale_type: int,
    table: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_float(dtype)
    check_units(units, spec_of(bits, group_size, n, k, symmetric, table), scale_type, units.device.type)
    return units.new_empty((n, k), dtype=dtype)


def _weight_of(
    x: torch.Tensor,
    units: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    symmetric: bool,
    compute: int,
    scale_factor: float,
    scale_type: int,
    table: int = 0,
    input_scale: float = 0.0,
    input_zero: int = 0,
) -> torch.Tensor:
    """W for the gradient, which treats rounded activations as unrounded."""
    return cpu_dequantize(units, bits, group_size, n, k, symmetric, scale_factor, scale_type, table, x.dtype)


define("cpu_dequantize", _DEQUANTIZE, {"CPU": _dequantize}, _fake_dequantize)
if define("cpu_linear", _LINEAR, {"CPU": _run}, _fake):
    gradient.register("quantkit::cpu_linear", _weight_of, bias_at=2)

cpu_linear: Callable[..., torch.Tensor] = torch.ops.quantkit.cpu_linear.default
cpu_dequantize: Callable[..., torch.Tensor] = torch.ops.quantkit.cpu_dequantize.default
