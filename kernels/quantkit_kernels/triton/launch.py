"""Launches of the Triton kernels: what a launch needs besides its tensors, and the checks of direct calls.

The kernels run on CUDA devices, and on the CPU in Triton's interpreter. `launch` and `dequantize` check their
arguments; `launched` and `written_out` are for callers that have.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import Any

import torch

from quantkit_kernels.checks import check_float, check_part, check_product
from quantkit_kernels.triton import unpack
from quantkit_kernels.triton.configs import Config
from quantkit_kernels.triton.layout import check_weight, geometry, is_by_row

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = tuple(KINDS)  # of activations
_TOKENS, _ROWS = (8, 16, 32, 64, 128), (64, 128)  # tile sizes that `launch` takes
_TICKETS = 1 << 19
_turn = threading.Lock()
_interpreter = threading.Lock()  # Triton's interpreter patches triton.language while a kernel runs
_rings: dict[torch.device, torch.Tensor] = {}
_next: dict[tuple[torch.device, bool], int] = {}


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
    if not 0 <= count <= _TICKETS:
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
def plan(
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
    return constants(bits, zero, fp8, group_size, k, kind, KINDS.get(scales, "fp32"), by_row)


def launch(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    config: Config,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel with given tile sizes; x [M, K] with K contiguous, y [M, N] contiguous or None. No gradient.

    ValueError or TypeError for arguments that do not fit together. The op checks its own arguments once and calls
    `launched`.
    """
    check(x, codes, scales, zeros, bias, bits, group_size, n, k)
    _check_place(x.device)
    if x.dim() != 2 or x.stride(1) != 1 or x.dtype not in (*KINDS, torch.float32):
        raise ValueError(
            f"x must be fp32, bf16 or fp16 [M, {k}] with contiguous rows, got {x.dtype} {list(x.shape)} with strides "
            f"{list(x.stride())}"
        )
    if bias is not None:
        check_part("bias", bias, (n,), (bias.dtype,), x.device)
    if y is not None:
        check_part("y", y, (x.shape[0], n), (x.dtype,), x.device)
    _check_config(config, codes.shape[1])
    if not x.shape[0]:
        return x.new_empty(0, n) if y is None else y
    with on(x.device):
        return launched(x, codes, scales, zeros, bias, bits, group_size, n, k, config, y)


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W [N, K] = (q - z) * s in fp32, rounded to `dtype`. ValueError or TypeError for arguments that do not fit."""
    check_dequantize(codes, scales, zeros, bits, group_size, n, k, dtype)
    _check_place(codes.device)
    with on(codes.device):
        return written_out(codes, scales, zeros, bits, group_size, n, k, dtype)


def launched(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    config: Config,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """`launch` of arguments that were checked, on the current device."""
    from quantkit_kernels.triton.linear import linear_kernel

    fp8 = codes.dtype == torch.float8_e4m3fn
    kind = None if torch.version.hip or x.device.type != "cuda" else KINDS.get(x.dtype)
    fixed = plan(
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


def written_out(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`dequantize` of arguments that were checked, on the current device."""
    from quantkit_kernels.triton.linear import dequantize_kernel

    fp8 = codes.dtype == torch.float8_e4m3fn
    fixed = plan(
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


def check_dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> None:
    check_weight(codes, scales, zeros, bits, group_size, n, k)
    check_float(dtype)


def check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    n: int,
    k: int,
) -> None:
    check_product(x, bias, n, k, codes.device)
    check_weight(codes, scales, zeros, bits, group_size, n, k)


def _check_place(device: torch.device) -> None:
    """Raise ValueError unless the kernels run on a device, in the interpreter the CPU."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        raise ValueError(f"the Triton kernels run on CUDA devices, the tensors are on {device}")


def _check_config(config: Config, chunks: int) -> None:
    """Raise ValueError unless tiles cover whole rows of blocks and trips whole chunks."""
    bm, bn, unroll, splits, warps, stages = config
    sizes = bm in _TOKENS and bn in _ROWS and warps in (1, 2, 4, 8, 16, 32) and 1 <= stages <= 8
    if not sizes or unroll < 1 or chunks % unroll or not 1 <= splits <= 64:
        raise ValueError(
            f"{config} does not fit a weight of {chunks} chunks: bm is {_or(_TOKENS)}, bn {_or(_ROWS)}, unroll divides "
            "the chunks, splits are 1 to 64, warps a power of two up to 32, stages 1 to 8"
        )


def _or(sizes: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"


def on(device: torch.device) -> Any:
    """Within it Triton, which launches on the current device, launches on this one; interpreted, one at a time."""
    return torch.cuda.device(device) if device.type == "cuda" else _interpreter


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
