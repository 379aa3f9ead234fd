"""`quantkit::triton_scaled_linear`: a linear whose weight and inputs are 8-bit codes, int8 or FP8 E4M3.

    x [..., K] bf16 or fp16 (the twin and the interpreter: also fp32); w int8 or float8_e4m3fn [N, K]; w_scale fp32
    [ceil(N/rows), K/G], each for `rows` rows of w and G columns; x_scale fp32 [1] and x_zero int32 [1] are stored ones,
    without them scales are taken from each token and group; sums int32 [N] of the rows of w, where there is an x_zero;
    bias [N] or None. Returns [..., N] in x's dtype.

FP8 products need a GPU of compute capability 8.9 or later. Elsewhere than on CUDA the op runs its twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from quantkit_kernels import gradient
from quantkit_kernels.checks import check_part, check_product
from quantkit_kernels.reference import scaled_linear as twin
from quantkit_kernels.registration import define
from quantkit_kernels.triton.configs import bucket
from quantkit_kernels.triton.launch import KINDS, chip, interpreted, on, tickets

_SCHEMA = (
    "(Tensor x, Tensor w, Tensor w_scale, Tensor? x_scale, Tensor? x_zero, Tensor? sums, Tensor? bias, int rows) "
    "-> Tensor"
)
FUSED_TOKENS = 4  # up to so many, each program rounds the inputs itself instead of a launch of its own
NUMBERS = {dtype: number for number, dtype in twin.CODES.items()}
Optional = torch.Tensor | None


class Product(NamedTuple):
    """The arguments of the op, in its order."""

    x: torch.Tensor
    w: torch.Tensor
    w_scale: torch.Tensor
    x_scale: Optional
    x_zero: Optional
    sums: Optional
    bias: Optional
    rows: int


class Config(NamedTuple):
    """Tile [BN, BM] of BK columns at a time, programs that share K, warps and pipeline stages."""

    bm: int
    bn: int
    bk: int
    splits: int
    warps: int
    stages: int


def rule(m: int, n: int, k: int, group: int, processors: int) -> Config:
    """128 columns at a time, at most a group, and splits until every multiprocessor has two programs."""
    bm, bk = bucket(m), 128 if group == k else min(128, group)
    warps, stages = (8, 3) if bm >= 64 else (4, 4)
    trips = -(-k // bk)
    for bn in (128, 64):
        tiles = -(-n // bn) * -(-m // bm)
        splits = max(1, min(-(-2 * processors // tiles), trips // 4, 16))
        if tiles * splits >= processors or bm >= 64:
            break
    each = -(-trips // splits)
    return Config(bm, bn, bk, -(-trips // each), warps, stages)


def constants(
    number: str, group: int, rows: int, k: int, fused: bool, zero: bool, cast: bool
) -> dict[str, Any]:
    """The kernel's constants of a scheme. cast: FP8 codes by the processor's instruction."""
    whole = group == k
    return {
        "FP8": number == "fp8_e4m3",
        "CAST": cast,
        "FUSED": fused and whole,
        "GROUP": 0 if whole else group,
        "ROWS": rows,
        "HAS_ZERO": zero,
    }


def launch(given: Product, config: Config, y: Optional = None) -> torch.Tensor:
    """The kernels with given tile sizes; x [M, K] with K contiguous, y [M, N] contiguous or None. No gradient."""
    _check(given)
    x = given.x
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(
            f"x must be [M, K] with contiguous rows, got {list(x.shape)} with strides {list(x.stride())}"
        )
    if y is not None:
        check_part("y", y, (x.shape[0], given.w.shape[0]), (x.dtype,), x.device)
    with on(x.device):
        return _launched(given, config, y)


def _launched(given: Product, config: Config, y: Optional = None) -> torch.Tensor:
    from quantkit_kernels.triton.scaled import scaled_linear_kernel

    x, w, w_scale, x_scale, x_zero, sums, bias, rows = given
    (m, k), n = x.shape, w.shape[0]
    groups, number = w_scale.shape[1], NUMBERS[w.dtype]
    group = k // groups
    y = x.new_empty(m, n) if y is None else y
    if not m:
        return y
    bm, bn, bk, splits, warps, stages = config
    cast = x.device.type == "cuda"
    fused = m <= FUSED_TOKENS and groups == 1 and x_scale is None
    codes, scales = (x, w_scale) if fused else _rounded(x, number, group, x_scale, x_zero, cast)
    tiles, trips = -(-n // bn) * -(-m // bm), -(-k // bk)
    parts = ring = y
    if splits > 1:
        parts = torch.empty(tiles * splits * bn * bm, dtype=torch.float32, device=x.device)
        ring = tickets(x.device, tiles)
    scaled_linear_kernel[(tiles, splits)](
        codes,
        w,
        scales,
        scales if x_zero is None else x_zero,
        w_scale,
        w_scale if sums is None else sums,
        y if bias is None else bias,
        y,
        parts,
        ring,
        m,
        n,
        k,
        codes.stride(0),
        0 if x_scale is not None else groups,
        groups,
        trips,
        **constants(number, group, rows, k, fused, x_zero is not None, cast),
        BM=bm,
        BN=bn,
        BK=bk,
        SPLIT=splits > 1,
        EVEN_K=k % bk == 0,
        HAS_BIAS=bias is not None,
        STAGES=stages,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    return y


def _rounded(
    x: torch.Tensor, number: str, group: int, x_scale: Optional, x_zero: Optional, cast: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] and scales of x [M, K]: the stored one, or [M, K/G]."""
    from quantkit_kernels.triton.scaled import quantize_kernel

    m, k = x.shape
    groups = k // group
    codes = torch.empty(m, k, dtype=twin.CODES[number], device=x.device)
    scales = torch.empty(m, groups, dtype=torch.float32, device=x.device) if x_scale is None else x_scale
    quantize_kernel[(m,)](
        x,
        codes,
        scales,
        scales if x_zero is None else x_zero,
        k,
        x.stride(0),
        groups,
        FP8=number == "fp8_e4m3",
        CAST=cast,
        GROUP=0 if groups == 1 else group,
        STATIC=x_scale is not None,
        HAS_ZERO=x_zero is not None,
        BK=1024 if groups == 1 else group,
        num_warps=4 if groups == 1 else 1,
    )
    return codes, scales


def _run(given: Product) -> torch.Tensor:
    x, (n, k) = given.x, given.w.shape
    tokens = x.reshape(-1, k)
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    _, processors, _ = chip(x.device)
    config = rule(max(len(tokens), 1), n, k, k // given.w_scale.shape[1], processors)
    with on(x.device):
        y = _launched(given._replace(x=tokens), config)
    return y.view(*x.shape[:-1], n)


def _twin(given: Product) -> torch.Tensor:
    x, w, w_scale, x_scale, x_zero, _, bias, rows = given
    n, k = w.shape
    number, group, tokens = NUMBERS[w.dtype], k // w_scale.shape[1], x.reshape(-1, k)
    if x_scale is None:
        codes, scale = twin.quantize_inputs(tokens, number, group)
    else:
        codes, scale = twin.quantize_inputs_by(tokens, number, x_scale, x_zero), x_scale.view(1, 1)
    y = twin.scaled_linear(codes, scale, x_zero, w, w_scale, bias, rows, x.dtype)
    return y.view(*x.shape[:-1], n)


def _any(*arguments: Any) -> torch.Tensor:
    given = Product(*arguments)
    _check(given)
    kind = given.x.device.type
    run = _run if kind == "cuda" or interpreted() else _twin
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return run(given)
    return run(given)


def _fake(*arguments: Any) -> torch.Tensor:
    given = Product(*arguments)
    _check(given)
    return given.x.new_empty((*given.x.shape[:-1], given.w.shape[0]))


def _check(given: Product) -> None:
    """Raise ValueError or TypeError for arguments that do not fit together."""
    x, w, w_scale, x_scale, x_zero, sums, bias, rows = given
    if w.dim() != 2 or w.dtype not in NUMBERS or not w.is_contiguous() or not w.numel():
        raise ValueError(f"w must be contiguous int8 or float8_e4m3fn [N, K], got {w.dtype} {list(w.shape)}")
    (n, k), device = w.shape, w.device
    check_product(x, bias, n, k, device)
    if x.dtype not in (*KINDS, torch.float32):
        raise TypeError(f"x must be fp32, bf16 or fp16, got {x.dtype}")
    blocks = -(-n // rows) if rows > 0 else 0
    if w_scale.dim() != 2 or w_scale.shape[0] != blocks or not w_scale.shape[1] or k % w_scale.shape[1]:
        raise ValueError(
            f"w_scale must be [ceil(N / rows), K / G] of w {[n, k]} with {rows} rows per scale, "
            f"got {list(w_scale.shape)}"
        )
    group = k // w_scale.shape[1]
    if group != k and group not in (32, 64, 128, 256, 512, 1024):
        raise ValueError(f"groups of 32 to 1024 columns, a power of two, or whole rows; got {group}")
    check_part("w_scale", w_scale, w_scale.shape, (torch.float32,), device)
    if bias is not None:
        check_part("bias", bias, (n,), (bias.dtype,), device)
    if (x_zero is None) != (sums is None) or (x_zero is not None and x_scale is None):
        raise ValueError(
            "a zero point of the inputs goes with their scale and with the sums of the rows of w"
        )
    if x_scale is not None:
        if group != k:
            raise ValueError("a stored scale of the inputs goes with one scale per row of w, not with groups")
        check_part("x_scale", x_scale, (1,), (torch.float32,), device)
    if x_zero is not None and sums is not None:
        if w.dtype != torch.int8:
            raise ValueError("only int8 inputs have a zero point")
        check_part("x_zero", x_zero, (1,), (torch.int32,), device)
        check_part("sums", sums, (n,), (torch.int32,), device)


def _weight(x: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, *rest: Any) -> torch.Tensor:
    """W [N, K] in x's dtype; the rounding of x passes gradients as if it were not there."""
    return twin.dequantize(w, w_scale, rest[-1], torch.float32).to(x.dtype)


if define("triton_scaled_linear", _SCHEMA, {"CompositeExplicitAutograd": _any}, _fake):
    gradient.register("quantkit::triton_scaled_linear", _weight, bias_at=6)

triton_scaled_linear: Callable[..., torch.Tensor] = torch.ops.quantkit.triton_scaled_linear.default
