"""Launches of the kernels of a quantized KV cache (`kv.py`): the ops `quantkit::kv_write` and `quantkit::kv_decode`.

Layout and arithmetic: `reference/kv_attention.py`, whose functions are the twins, used elsewhere than on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from quantkit_kernels.checks import check_part
from quantkit_kernels.reference import kv_attention as twin
from quantkit_kernels.registration import define
from quantkit_kernels.triton.launch import KINDS, chip, interpreted, on, tickets

_WRITE = (
    "(Tensor k, Tensor v, Tensor(a!) k_codes, Tensor(b!) v_codes, Tensor(c!) k_scales, Tensor(d!) v_scales, "
    "Tensor begin, bool stored) -> ()"
)
_DECODE = (
    "(Tensor q, Tensor k, Tensor k_scales, Tensor v, Tensor v_scales, Tensor first, Tensor end, float scale, "
    "float softcap) -> Tensor"
)
CHUNK = 256  # places that a program reads at least


class Written(NamedTuple):
    """The arguments of `kv_write`, in its order."""

    k: torch.Tensor
    v: torch.Tensor
    k_codes: torch.Tensor
    v_codes: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor
    begin: torch.Tensor
    stored: bool


class Read(NamedTuple):
    """The arguments of `kv_decode`, in its order."""

    q: torch.Tensor
    k: torch.Tensor
    k_scales: torch.Tensor
    v: torch.Tensor
    v_scales: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor
    scale: float
    softcap: float


class Config(NamedTuple):
    """Places at a time, programs per kv head, warps and pipeline stages."""

    bs: int
    splits: int
    warps: int
    stages: int


def rule(pairs: int, places: int, processors: int) -> Config:
    """64 places at a time, and splits until every multiprocessor has two programs. pairs: sequences x kv heads."""
    splits = max(1, min(-(-2 * processors // pairs), places // CHUNK, 64))
    return Config(64, splits, 4, 4)


def constants(
    dtype: torch.dtype, group: int, d: int, stored: bool, capped: bool, cast: bool
) -> dict[str, Any]:
    """The constants of `decode_kernel`. cast: FP8 codes by the processor's instruction."""
    return {
        "FP8": dtype == torch.float8_e4m3fn,
        "CAST": cast,
        "STATIC": stored,
        "CAPPED": capped,
        "M": max(16, _power_of_two(group)),
        "D": max(16, _power_of_two(d)),
    }


def decode(given: Read, config: Config | None = None) -> torch.Tensor:
    """`kv_decode` by the kernel, with given sizes or by the rule."""
    from quantkit_kernels.triton.kv import decode_kernel

    _check_decode(given)
    q, k, k_scales, v, v_scales, first, end, scale, softcap = given
    b, heads, d = q.shape
    kv_heads, places = k.shape[1], k.shape[2]
    pairs = b * kv_heads
    out = torch.empty_like(q)
    with on(q.device):
        _, processors, major = chip(q.device)
        config = config or rule(pairs, places, processors)
        cast = q.device.type == "cuda" and major >= 9
        fixed = constants(k.dtype, heads // kv_heads, d, k_scales.shape[2] == 1, softcap != 0, cast)
        parts = ring = out
        if config.splits > 1:
            size = pairs * config.splits * fixed["M"] * (fixed["D"] + 2)
            parts = torch.empty(size, dtype=torch.float32, device=q.device)
            ring = tickets(q.device, pairs)
        decode_kernel[(pairs, config.splits)](
            q,
            _bytes(k),
            _bytes(v),
            k_scales,
            v_scales,
            first,
            end,
            out,
            parts,
            ring,
            kv_heads,
            heads // kv_heads,
            places,
            d,
            scale,
            softcap,
            **fixed,
            BS=config.bs,
            SPLIT=config.splits > 1,
            STAGES=config.stages,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
    return out


def write(given: Written) -> None:
    """`kv_write` by the kernel."""
    from quantkit_kernels.triton.kv import write_kernel

    _check_write(given)
    k, v, k_codes, v_codes, k_scales, v_scales, begin, stored = given
    b, heads, tokens, d = k.shape
    if not tokens:
        return
    with on(k.device):
        _, _, major = chip(k.device)
        write_kernel[(tokens, b * heads)](
            k,
            v,
            _bytes(k_codes),
            _bytes(v_codes),
            k_scales,
            v_scales,
            begin,
            heads,
            tokens,
            k_codes.shape[2],
            d,
            *k.stride()[:3],
            *v.stride()[:3],
            FP8=k_codes.dtype == torch.float8_e4m3fn,
            CAST=k.device.type == "cuda" and major >= 9,
            STATIC=stored,
            D=_power_of_two(d),
            num_warps=1,
        )


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _twin_write(given: Written) -> None:
    _check_write(given)
    k, v, k_codes, v_codes, k_scales, v_scales, begin, stored = given
    for x, codes, scales in ((k, k_codes, k_scales), (v, v_codes, v_scales)):
        made, of = twin.quantize_entries(x, codes.dtype, scales if stored else None)
        for row, start in enumerate(begin.tolist()):
            here = slice(start, start + x.shape[2])
            _bytes(codes)[row, :, here] = _bytes(made)[row]
            if not stored:
                scales[row, :, here] = of[row]


def _check_write(given: Written) -> None:
    """Raise ValueError unless new entries and cache fit together; the places are checked by the caller of the op."""
    k, v, k_codes, v_codes, k_scales, v_scales, begin, stored = given
    if k.dim() != 4 or k.stride(3) != 1 or v.shape != k.shape or v.stride(3) != 1 or v.dtype != k.dtype:
        raise ValueError(
            f"k and v must be alike, [B, H, T, D] with contiguous rows, got {list(k.shape)}, {list(v.shape)}"
        )
    _check_cache(k_codes, k_scales, v_codes, v_scales, k.device)
    if k_codes.shape[:2] != k.shape[:2] or k_codes.shape[3] != k.shape[3] or k_codes.shape[2] < k.shape[2]:
        raise ValueError(f"entries {list(k.shape)} do not fit a cache {list(k_codes.shape)}")
    if stored != (k_scales.shape[2] == 1 and k_scales.shape[0] == 1):
        raise ValueError("stored scales are [1, H, 1], those of tokens [B, H, S]")
    check_part("begin", begin, (k.shape[0],), (torch.int32,), k.device)


def _check_decode(given: Read) -> None:
    """Raise ValueError or TypeError unless queries and cache fit together; first < end <= S is the caller's part."""
    q, k, k_scales, v, v_scales, first, end, _, _ = given
    if q.dim() != 3 or not q.is_contiguous() or q.dtype not in (*KINDS, torch.float32):
        raise ValueError(
            f"q must be contiguous fp32, bf16 or fp16 [B, heads, D], got {q.dtype} {list(q.shape)}"
        )
    _check_cache(k, k_scales, v, v_scales, q.device)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"queries {list(q.shape)} do not fit a cache {list(k.shape)}")
    for name, tensor in (("first", first), ("end", end)):
        check_part(name, tensor, (q.shape[0],), (torch.int32,), q.device)


def _check_cache(
    k: torch.Tensor, k_scales: torch.Tensor, v: torch.Tensor, v_scales: torch.Tensor, device: torch.device
) -> None:
    if k.dim() != 4 or not k.numel() or k.shape[3] > 256:
        raise ValueError(f"codes must be [B, H, S, D], D up to 256, got {list(k.shape)}")
    b, heads, places, _ = k.shape
    for name, codes, scales in (("k", k, k_scales), ("v", v, v_scales)):
        check_part(f"codes of {name}", codes, k.shape, (torch.int8, torch.float8_e4m3fn), device)
        wanted = (1, heads, 1) if scales.shape == (1, heads, 1) else (b, heads, places)
        check_part(f"scales of {name}", scales, wanted, (torch.float32,), device)
    if k.dtype != v.dtype or k_scales.shape != v_scales.shape:
        raise ValueError("keys and values must be quantized alike")


def _any_write(*arguments: Any) -> None:
    given = Written(*arguments)
    (write if given.k.device.type == "cuda" or interpreted() else _twin_write)(given)


def _any_decode(*arguments: Any) -> torch.Tensor:
    given = Read(*arguments)
    if given.q.device.type == "cuda" or interpreted():
        return decode(given)
    _check_decode(given)
    return twin.kv_decode(*given)


def _fake_decode(*arguments: Any) -> torch.Tensor:
    given = Read(*arguments)
    _check_decode(given)
    return torch.empty_like(given.q)


define("kv_write", _WRITE, {"CompositeExplicitAutograd": _any_write}, lambda *given: None)
define("kv_decode", _DECODE, {"CompositeExplicitAutograd": _any_decode}, _fake_decode)

kv_write: Callable[..., None] = torch.ops.quantkit.kv_write.default
kv_decode: Callable[..., torch.Tensor] = torch.ops.quantkit.kv_decode.default
