"""`quantkit::triton_linear`: a packed linear on the storage of `layout.py`.

    x [..., K] bf16 or fp16 (the twin and the interpreter: also fp32); codes, scales, zeros as in `layout.py`, FP8
    weights by the dtype of the codes; bias [N] of any float type, added before the one rounding, or None; returns
    [..., N] in x's dtype, also under autocast.

The kernels run on CUDA devices. Elsewhere the op restores the stored tensors and runs the reference. Call it once
before capturing a CUDA graph: the first call compiles, and allocates the ring of tickets.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import Any

import torch

from quantkit_kernels import gradient
from quantkit_kernels.reference.wna16_linear import dequantize as reference_dequantize
from quantkit_kernels.registration import define
from quantkit_kernels.stored import FLOATS, Spec
from quantkit_kernels.triton import unpack
from quantkit_kernels.triton.configs import Config, choose, table
from quantkit_kernels.triton.layout import geometry, is_by_row, restore, restore_fp8, shapes

_WEIGHT = "int bits, int group_size, int n, int k"
_SCHEMA = f"(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, {_WEIGHT}) -> Tensor"
_DEQUANTIZE = f"(Tensor codes, Tensor scales, Tensor? zeros, {_WEIGHT}, ScalarType dtype) -> Tensor"
_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = tuple(_KINDS)  # of activations
_TICKETS = 1 << 19
_turn = threading.Lock()
_rings: dict[torch.device, torch.Tensor] = {}
_next: dict[tuple[torch.device, bool], int] = {}


def _twin(x, codes, scales, zeros, bias, bits, group_size, n, k):
    w = _twin_dequantize(codes, scales, zeros, bits, group_size, n, k, x.dtype)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


def _twin_dequantize(codes, scales, zeros, bits, group_size, n, k, dtype):
    if codes.dtype == torch.float8_e4m3fn:
        weight, scale = restore_fp8(codes, scales, group_size, n, k)
        return (weight.float().view(n, -1, group_size) * scale.float()[:, :, None]).view(n, k).to(dtype)
    spec = Spec.integer(bits, group_size, zeros is None, n, k)
    return reference_dequantize(restore(codes, scales, zeros, spec), dtype)


@cache
def chip(device: torch.device) -> tuple[str, int, int]:
    """Name, number of multiprocessors, first number of the capability (AMD: 0); the interpreter plays an H200."""
    if device.type != "cuda":
        return "interpreter", 132, 9
    found = torch.cuda.get_device_properties(device)
    return found.name, found.multi_processor_count, 0 if torch.version.hip else found.major


def tickets(device: torch.device, count: int) -> torch.Tensor:
    """`count` zero counters that no running launch uses, taken from a ring of 4 MiB per device.

    A graph keeps its counters, so captured launches use a separate ring.
    """
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device not in _rings:
        if captured:
            raise RuntimeError("call triton_linear once on this device before capturing a CUDA graph")
        _rings[device] = torch.zeros(2, _TICKETS, dtype=torch.int32, device=device)
    if count > _TICKETS:
        raise ValueError(f"a split launch has at most {_TICKETS} tiles, got {count}")
    with _turn:
        start = _next.get((device, captured), 0)
        start = 0 if start + count > _TICKETS else start
        _next[device, captured] = (
            start + -(-count // 32) * 32
        )  # aligned: triton compiles for the alignment, too
    return _rings[device][int(captured), start : start + count]


def constants(
    bits: int, zero: bool, fp8: bool, group_size: int, k: int, kind: str | None, scales: str, by_row: bool
) -> dict[str, Any]:
    """The kernel's constants of a scheme. kind None: no assembly; scales: their type; by_row: the order of codes."""
    cut = geometry(bits, group_size, k)
    lane = bits if bits < 5 else 8
    per_plane = {2: 4, 3: 4, 4: 2, 8: 1}[lane]
    run = min(cut.run, per_plane)
    step = run if zero else per_plane
    middle = 2 ** (bits - 1)
    return {
        "BITS": lane,
        "FP8": fp8,
        "ZERO": middle,
        "BASES": "|".join(map(str, unpack.bases(lane, kind))) if kind else "0",
        "SCALES": scales,
        "GROUP": cut.group,
        "H": cut.h,
        "PLANES": cut.planes,
        "BY_ROW": by_row,
        "RUN": run,
        "STEP": step,
        "HAS_ZEROS": zero,
        "ASM": "|".join(sum(unpack.blocks(lane, kind, None if zero else middle, step, fp8), ()))
        if kind
        else None,
        "EVEN_K": k == cut.chunks * cut.chunk,
    }


@cache
def _plan(
    device: torch.device,
    bits: int,
    zero: bool,
    fp8: bool,
    group_size: int,
    n: int,
    k: int,
    kind: str | None,
    scales: torch.dtype,
    by_row: bool,
) -> dict[str, Any]:
    return constants(bits, zero, fp8, group_size, k, kind, _KINDS.get(scales, "fp32"), by_row)


def launch(x, codes, scales, zeros, bias, bits, group_size, n, k, config: Config, y=None) -> torch.Tensor:
    """The kernel with given tile sizes; x [M, K] with K contiguous, y [M, N] contiguous or None.

    Trusts the sizes of the weight, which the op has checked.
    """
    from quantkit_kernels.triton.linear import linear_kernel

    fp8 = codes.dtype == torch.float8_e4m3fn
    kind = None if torch.version.hip or x.device.type != "cuda" else _KINDS.get(x.dtype)
    fixed = _plan(
        x.device, bits, zeros is not None, fp8, group_size, n, k, kind, scales.dtype, is_by_row(codes)
    )
    chunks, words = codes.shape[1], scales.shape[1]
    bm, bn, unroll, splits, warps, stages = config
    m = x.shape[0]
    tiles = -(-n // bn) * -(-m // bm)
    y = x.new_empty(m, n) if y is None else y
    parts = ring = y
    if splits > 1:
        parts = torch.empty(tiles * splits * bn * bm, dtype=torch.float32, device=x.device)
        ring = tickets(x.device, tiles)
    linear_kernel[(tiles, splits)](
        x,
        codes.view(torch.uint8),
        scales.view(torch.int32),
        (scales if zeros is None else zeros).view(torch.int32),
        y if bias is None else bias,
        y,
        parts,
        ring,
        m,
        n,
        k,
        x.stride(0),
        words,
        chunks,
        chunks // unroll,
        **fixed,
        BM=bm,
        BN=bn,
        UNROLL=unroll,
        SPLIT=splits > 1,
        HAS_BIAS=bias is not None,
        STAGES=stages,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    return y


def dequantize(codes, scales, zeros, bits, group_size, n, k, dtype) -> torch.Tensor:
    """W [N, K] = (q - z) * s in fp32, rounded to `dtype`. Trusts sizes, which the op has checked."""
    from quantkit_kernels.triton.linear import dequantize_kernel

    fp8 = codes.dtype == torch.float8_e4m3fn
    fixed = _plan(
        codes.device, bits, zeros is not None, fp8, group_size, n, k, None, scales.dtype, is_by_row(codes)
    )
    names = ("BITS", "FP8", "ZERO", "SCALES", "GROUP", "H", "PLANES", "BY_ROW", "HAS_ZEROS")
    out = torch.empty(n, k, dtype=dtype, device=codes.device)
    blocks, chunks = codes.shape[:2]
    dequantize_kernel[(chunks, blocks)](
        codes.view(torch.uint8),
        scales.view(torch.int32),
        (scales if zeros is None else zeros).view(torch.int32),
        out,
        n,
        k,
        scales.shape[1],
        chunks,
        **{name: fixed[name] for name in names},
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _check_weight(codes, scales, zeros, bits: int, group_size: int, n: int, k: int) -> None:
    """Raise ValueError unless the sizes fit: the kernels trust them and would read other memory."""
    fp8 = codes.dtype == torch.float8_e4m3fn
    if codes.dtype != torch.uint8 and not (fp8 and bits == 8 and zeros is None):
        raise ValueError(
            f"codes are uint8, or float8_e4m3fn of 8 bits without zeros, got {codes.dtype}, {bits} bits"
        )
    if scales.dtype not in FLOATS:
        raise ValueError(f"scales are fp32, bf16 or fp16, got {scales.dtype}")
    by_row = codes.dim() == 5 and is_by_row(codes)
    wanted, of_scales = _shapes(bits, group_size, n, k, by_row, scales.element_size())
    for name, tensor, shape, dtype in (
        ("codes", codes, wanted, codes.dtype),
        ("scales", scales, of_scales, scales.dtype),
        ("zeros", zeros, of_scales, scales.dtype),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} of a {bits}-bit [{n}, {k}] weight are contiguous {dtype} {list(shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)} with strides {tensor.stride()}"
            )
        if tensor.device != codes.device:
            raise ValueError(
                f"{name} are on {tensor.device}, codes on {codes.device}; move them to one device"
            )


@cache
def _shapes(bits: int, group_size: int, n: int, k: int, by_row: bool, scale_bytes: int) -> tuple[Any, ...]:
    """`layout.shapes` of the weight; ValueError if the kernels do not take it."""
    Spec.integer(bits, group_size, True, n, k)
    return shapes(bits, group_size, n, k, by_row, scale_bytes)


def _check(x, codes, scales, zeros, bias, bits: int, group_size: int, n: int, k: int) -> None:
    if not x.dim() or x.shape[-1] != k:
        raise ValueError(f"x has {x.shape[-1] if x.dim() else 0} features, the weight takes {k}")
    if not x.is_floating_point() or x.device != codes.device:
        raise ValueError(f"x is a float tensor on {codes.device}, got {x.dtype} on {x.device}")
    if bias is not None and (bias.shape != (n,) or not bias.is_floating_point() or bias.device != x.device):
        raise ValueError(
            f"bias must be [{n}] of a float type on {x.device}, got {bias.dtype} {list(bias.shape)} on {bias.device}"
        )
    _check_weight(codes, scales, zeros, bits, group_size, n, k)


def _run(x, codes, scales, zeros, bias, bits, group_size, n, k):
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if m == 0:
        return x.new_empty(*x.shape[:-1], n)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    bias = None if bias is None else bias.contiguous()
    name, processors, major = chip(x.device)
    if m >= table(name).dequantize_from or x.dtype not in (*_KINDS, torch.float32):
        w = dequantize(codes, scales, zeros, bits, group_size, n, k, x.dtype)
        y = torch.nn.functional.linear(rows, w, None if bias is None else bias.to(x.dtype))
    else:
        fp8 = codes.dtype == torch.float8_e4m3fn
        cut = geometry(bits, group_size, k)
        config = choose(name, bits, group_size, fp8, m, n, k, cut, processors, major)
        y = launch(rows, codes, scales, zeros, bias, bits, group_size, n, k, config)
    return y.view(*x.shape[:-1], n)


def _cuda(x, *rest):
    _check(x, *rest)
    with torch.cuda.device(x.device):  # triton launches on the current device
        if torch.is_autocast_enabled("cuda"):
            with torch.autocast("cuda", enabled=False):
                return _run(x, *rest)
        return _run(x, *rest)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _other(x, *rest):
    _check(x, *rest)
    run = _run if _interpreted() else _twin
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *rest)
    return run(x, *rest)


def _fake(x, codes, scales, zeros, bias, bits, group_size, n, k):
    _check(x, codes, scales, zeros, bias, bits, group_size, n, k)
    return x.new_empty((*x.shape[:-1], n))


def _dequantize(codes, *rest):
    _check_weight(codes, *rest[:-1])
    if codes.device.type == "cuda":
        with torch.cuda.device(codes.device):
            return dequantize(codes, *rest)
    return (dequantize if _interpreted() else _twin_dequantize)(codes, *rest)


def _fake_dequantize(codes, scales, zeros, bits, group_size, n, k, dtype):
    return codes.new_empty((n, k), dtype=dtype)


def _weight_of(x, codes, scales, zeros, bias, bits, group_size, n, k):
    return torch.ops.quantkit.triton_dequantize(codes, scales, zeros, bits, group_size, n, k, x.dtype)


define("triton_dequantize", _DEQUANTIZE, {"CompositeExplicitAutograd": _dequantize}, _fake_dequantize)
if define("triton_linear", _SCHEMA, {"CompositeExplicitAutograd": _other, "CUDA": _cuda}, _fake):
    gradient.register("quantkit::triton_linear", _weight_of, bias_at=4)

triton_linear = torch.ops.quantkit.triton_linear.default
