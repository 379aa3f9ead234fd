"""The op on the native layout, and the way between that layout and the tensors on disk.

`quantkit::cpu_linear(x, units, bias, bits, group_size, n, k, symmetric, compute, scale_factor, wide_scales, table)`
    x [..., K] fp32, bf16 or fp16; units uint8 [B] from `pack`; bias fp32 [N] or None; returns [..., N] in
    x's dtype. compute: 0 float, 1 int8 activations per token and group, 2 per token. table: 0, or 1 NF4 and 2 FP8
    E4M3, whose codes index a table instead of being numbers (`pack_codes`); they take compute float only.

The dispatcher and an implementation in Python take longer than a small weight does. So `linear` is the same without
them where they would add nothing, and `bind` is that for one weight, checked once.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from quantkit_kernels.bits import pack_bits, words
from quantkit_kernels.cpu import library

FLOAT, INT8_GROUP, INT8_TOKEN, HALVES = range(4)  # qk::Compute
BITS = (2, 3, 4, 8)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_TABLES = {None: 0, "nf4": 1, "fp8_e4m3": 2}  # qk::Table
_TABLE_BITS = {"nf4": 4, "fp8_e4m3": 8}
_SCHEMA = (
    "(Tensor x, Tensor units, Tensor? bias, int bits, int group_size, int n, int k, bool symmetric, "
    "int compute, float scale_factor, bool wide_scales, int table=0) -> Tensor"
)


class Packed(NamedTuple):
    """A weight [N, K] in the native layout. scale_factor multiplies every stored scale."""

    units: torch.Tensor  # uint8 [B]
    scale_factor: float
    wide_scales: bool
    scale_dtype: torch.dtype
    bits: int
    group_size: int
    n: int
    k: int
    symmetric: bool
    table: str | None = None

    def weight(self, units: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> library.Weight:
        """The C struct; it points into `units` (else self.units) and `bias`, which must outlive it."""
        return library.Weight(
            (self.units if units is None else units).data_ptr(),
            None if bias is None else bias.data_ptr(),
            self.scale_factor,
            self.n,
            self.k,
            self.group_size,
            self.bits,
            self.wide_scales,
            _TABLES[self.table],
        )

    def bind(self, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        """`cpu_linear` on this weight: call(x, bias, compute) -> y for `plain` x of `dtype` and `plain` bias of any.

        Calls must be `direct`, and `units` stay alive and in its place.
        """
        units, facts = self.units, (self.bits, self.group_size, self.n, self.k)
        _check_units(units, *facts, self.wide_scales)
        c, scales = library.required(), (self.scale_factor, self.wide_scales)
        return _bound(c, units.data_ptr(), units.numel(), dtype, *facts, *scales, _TABLES[self.table])

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None, compute: int = FLOAT) -> torch.Tensor:
        """x [..., K] W^T + bias, [..., N] in x's dtype."""
        facts = (self.bits, self.group_size, self.n, self.k, self.symmetric, compute)
        scales = (self.scale_factor, self.wide_scales, _TABLES[self.table])
        return linear(x, self.units, None if bias is None else bias.float(), *facts, *scales)


def refuses(bits: int, group_size: int, k: int) -> str | None:
    """Why the native kernels cannot run this scheme, or None."""
    if bits not in BITS:
        return f"the native kernels take 2, 3, 4 and 8 bits, not {bits}"
    if group_size != k and group_size not in (32, 64) and group_size % 128:
        return f"the native kernels take groups of 32, 64, multiples of 128 or whole rows, not {group_size}"
    return None


def _storage(scale: torch.Tensor) -> tuple[float, bool]:
    """(factor, wide): the power of two by which all scales are exact in fp16, or fp32 scales if there is none."""
    scale = scale.float()
    most = float(scale.abs().max()) if scale.numel() else 0.0
    factor = 1.0 if most == 0 or not math.isfinite(most) else 2.0 ** (math.frexp(most)[1] - 15)
    for candidate in (1.0, factor):
        if torch.equal((scale / candidate).half().float() * candidate, scale):
            return candidate, False
    return 1.0, True


def pack(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_packed: torch.Tensor | None,
    bits: int,
    n: int,
    k: int,
    table: str | None = None,
) -> Packed:
    """packed int32 [N, ceil(K bits / 32)], scale [N, K/G], zero_packed int32 [ceil(N bits / 32), K/G] or None.

    table: None for integers, "nf4" (4 bits) or "fp8_e4m3" (8 bits) for codes that index a table.
    """
    group_size = k // scale.shape[1]
    reason = refuses(bits, group_size, k) or _table_refuses(table, bits, zero_packed)
    if reason:
        raise ValueError(reason)
    for name, tensor, shape in (
        ("packed", packed, (n, words(k, bits))),
        ("scale", scale, (n, k // group_size)),
        ("zero_packed", zero_packed, (words(n, bits), k // group_size)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} of a {bits}-bit [{n}, {k}] weight is {shape}, got {tuple(tensor.shape)}"
            )
    factor, wide = _storage(scale)
    out = Packed(
        torch.empty(0, dtype=torch.uint8),
        factor,
        wide,
        scale.dtype,
        bits,
        group_size,
        n,
        k,
        zero_packed is None,
        table,
    )
    c, weight = library.required(), out.weight()
    units = torch.empty(c.qk_weight_bytes(weight), dtype=torch.uint8)
    packed, scale = packed.contiguous(), (scale.float() / factor).contiguous()
    zero_packed = None if zero_packed is None else zero_packed.contiguous()
    zeros = None if zero_packed is None else zero_packed.data_ptr()
    c.qk_pack(weight, units.data_ptr(), packed.data_ptr(), scale.data_ptr(), zeros)
    return out._replace(units=units)


def pack_codes(codes: torch.Tensor, scale: torch.Tensor, table: str) -> Packed:
    """Weights stored by table: codes uint8 [N, K], scale [N, K/G]; w = table[code] * scale, exactly as stored.

    table: "nf4", codes 0 to 15 in the order of QLoRA (Dettmers et al. 2023, appendix E), or "fp8_e4m3", codes the bytes
    of a float8_e4m3fn tensor (`.view(torch.uint8)`).
    """
    if codes.dim() != 2 or scale.dim() != 2 or len(scale) != len(codes) or scale.shape[1] == 0:
        raise ValueError(
            f"codes are [N, K] and scale [N, K/G], got {list(codes.shape)} and {list(scale.shape)}"
        )
    n, k = codes.shape
    if k % scale.shape[1]:
        raise ValueError(f"{k} columns do not divide into {scale.shape[1]} groups")
    bits = _TABLE_BITS.get(table)
    if bits is None:
        raise ValueError(f"unknown table {table!r}; known: {', '.join(_TABLE_BITS)}")
    return pack(pack_bits(codes, bits), scale, None, bits, n, k, table)


def _table_refuses(table: str | None, bits: int, zero_packed: torch.Tensor | None) -> str | None:
    if table is None:
        return None
    if bits != _TABLE_BITS[table]:
        return f"codes of {table} have {_TABLE_BITS[table]} bits, not {bits}"
    return None if zero_packed is None else f"codes of {table} have no zero points"


def unpack(weight: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The tensors that `pack` was given: packed, scale, zero_packed; bit for bit."""
    groups = weight.k // weight.group_size
    packed = torch.empty(weight.n, words(weight.k, weight.bits), dtype=torch.int32)
    scale = torch.empty(weight.n, groups)
    zero = None if weight.symmetric else torch.empty(words(weight.n, weight.bits), groups, dtype=torch.int32)
    library.required().qk_unpack(
        weight.weight(), packed.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr()
    )
    return packed, (scale * weight.scale_factor).to(weight.scale_dtype), zero


@functools.cache
def units_bytes(bits: int, group_size: int, n: int, k: int, wide_scales: bool) -> int:
    """Bytes of the units of a weight [N, K]: 16 rows x C columns each, and their scales."""
    columns = 128 if group_size == k or group_size % 128 == 0 else group_size
    units, scales = -(-k // columns), 128 if wide_scales else 64
    return -(-n // 16) * (units * columns * bits * 2 + (1 if group_size == k else units) * scales)


def _check(x, units, bias, bits, group_size, n, k, wide_scales) -> None:
    """TypeError or ValueError unless memory is what the native code takes it for."""
    _check_features(x.shape[-1], k)
    if x.dtype not in _TYPES:
        raise TypeError(f"x must be fp32, bf16 or fp16, got {x.dtype}")
    _check_units(units, bits, group_size, n, k, wide_scales)
    if bias is not None:
        _check_bias(bias, n)


def _check_features(features: int, k: int) -> None:
    if features != k:
        raise ValueError(f"x has {features} features, the weight takes {k}")


def _check_units(units, bits, group_size, n, k, wide_scales) -> None:
    size = units_bytes(bits, group_size, n, k, wide_scales)
    if units.numel() != size or units.dtype != torch.uint8 or not units.is_contiguous():
        got = f"{units.dtype} {list(units.shape)}"
        raise ValueError(f"units of a {bits}-bit [{n}, {k}] weight are contiguous uint8 [{size}], got {got}")


def _check_bias(bias, n) -> None:
    if bias.shape != (n,) or bias.dtype != torch.float32 or not bias.is_contiguous():
        raise ValueError(f"bias must be contiguous fp32 [{n}], got {bias.dtype} {list(bias.shape)}")


def _run(x, units, bias, bits, group_size, n, k, symmetric, compute, scale_factor, wide_scales, table=0):
    if bias is not None:
        _check_bias(bias, n)
    weight = (x.dtype, bits, group_size, n, k, scale_factor, wide_scales, table)
    call = None
    if units.dtype is torch.uint8 and units.is_contiguous():
        call = _bound(library.required(), units.data_ptr(), units.numel(), *weight)
    if call is None:
        _check(x, units, bias, bits, group_size, n, k, wide_scales)
    return call(x, bias, compute)


@functools.lru_cache(maxsize=4096)
def _bound(c, at, size, dtype, bits, group_size, n, k, scale_factor, wide_scales, table=0):
    """call(x, bias, compute) on the `size` bytes of units at an address; None if that or dtype is wrong.

    Kept, as making the C struct alone takes longer than what it is for.
    """
    if dtype not in _TYPES or size != units_bytes(bits, group_size, n, k, wide_scales):
        return None
    kind, numbers = _TYPES[dtype], (scale_factor, n, k, group_size, bits, wide_scales, table)
    # Without argtypes ctypes converts nothing, which is half the cost of the call. A Python int is a C int then.
    native, pointer, threads = c["qk_linear"], ctypes.c_void_p, torch.get_num_threads
    bare = ctypes.byref(library.Weight(at, None, *numbers))
    # Of the call before. Each is one tuple that is read and replaced whole: threads share them.
    shapes, biased = ((), (), ctypes.c_int64()), (0, bare)  # of x, of y, M; address of the bias, struct

    def call(x: torch.Tensor, bias: torch.Tensor | None, compute: int) -> torch.Tensor:
        nonlocal shapes, biased
        shape, sizes, m = shapes
        if x.shape != shape:
            *lead, features = shape = x.shape
            _check_features(features, k)
            shapes = shape, sizes, m = shape, (*lead, n), ctypes.c_int64(x.numel() // k)
        if not x.is_contiguous():
            x = x.contiguous()
        struct = bare
        if bias is not None:
            bias = bias.float()
            _check_bias(bias, n)
            there, struct = biased
            if bias.data_ptr() != there:
                there = bias.data_ptr()
                biased = there, struct = there, ctypes.byref(library.Weight(at, there, *numbers))
        y = x.new_empty(*sizes)
        status = native(
            struct, pointer(x.data_ptr()), kind, m, compute, pointer(y.data_ptr()), kind, threads()
        )
        if status:
            raise _failure(status, compute, table)
        return y

    return call


def run(x: torch.Tensor, weight: library.Weight, m: int, compute: int, y: torch.Tensor) -> None:
    """y [M, N] = x [M, K] W^T + bias, both contiguous and of one dtype; the bare call, for weights of tables too."""
    kind = _TYPES[x.dtype]
    linear = library.required().qk_linear
    status = linear(weight, x.data_ptr(), kind, m, compute, y.data_ptr(), kind, torch.get_num_threads())
    if status:
        raise _failure(status, compute, weight.table)


def _failure(status: int, compute: int, table: int) -> Exception:
    library.isa()  # says so if the forced instruction set is missing
    if status == 2:
        return RuntimeError("no memory")
    if table and compute in (INT8_GROUP, INT8_TOKEN):
        name = next(name for name, number in _TABLES.items() if number == table)
        return ValueError(f"weights stored by table ({name}) have no compute int8; use compute float")
    return ValueError("the native kernels do not take these bits, this group or this table")


def plain(x: torch.Tensor) -> bool:
    """Whether a tensor is ordinary memory of the CPU that needs no gradient."""
    return type(x) in _PLAIN and x.is_cpu and not x.is_neg() and not (x.requires_grad and is_grad_enabled())


def unwatched(x: torch.Tensor) -> bool:
    """Whether x, on any device, needs no gradient and nobody traces, transforms or intercepts calls with it."""
    return (
        not is_compiling()
        and type(x) in _PLAIN
        and not (x.requires_grad and is_grad_enabled())
        and not _len_torch_dispatch_stack()
        and not _len_torch_function_stack()
        and peek_interpreter_stack() is None
        and _get_tracing_state() is None
    )


def direct(x: torch.Tensor) -> bool:
    """Whether x is `plain` and `unwatched`."""
    return unwatched(x) and x.is_cpu and not x.is_neg()


def linear(x, units, bias, bits, group_size, n, k, symmetric, compute, scale_factor, wide_scales, table=0):
    """`cpu_linear`, past the dispatcher if it may be."""
    past = direct(x) and plain(units) and (bias is None or plain(bias))
    call = _run if past else cpu_linear
    facts = (bits, group_size, n, k, symmetric, compute, scale_factor, wide_scales, table)
    return call(x, units, bias, *facts)


def _fake(x, units, bias, bits, group_size, n, k, symmetric, compute, scale_factor, wide_scales, table=0):
    _check(x, units, bias, bits, group_size, n, k, wide_scales)
    if table and compute in (INT8_GROUP, INT8_TOKEN):
        raise _failure(1, compute, table)
    return x.new_empty((*x.shape[:-1], n))


if not hasattr(torch.ops.quantkit, "cpu_linear"):  # a second copy of this module must not define it again
    torch.library.define("quantkit::cpu_linear", _SCHEMA)
    torch.library.impl("quantkit::cpu_linear", "CPU")(_run)
    torch.library.register_fake("quantkit::cpu_linear")(_fake)

cpu_linear = torch.ops.quantkit.cpu_linear.default
