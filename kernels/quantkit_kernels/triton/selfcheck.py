"""Self-test of the Triton kernels: compare them with the reference on a device before "auto" takes them.

An untested compiler, driver or chip must not produce a silently broken model. When "auto" first considers a device and
scheme, small random weights run through every kernel that a model needs: tiles of few and of many tokens, K split over
programs, a bias, the dequantized weight. Every output must match fp64 within the rounding of its type, and repeat bit
for bit. `scaled_selfcheck.py` does the same for products of 8-bit codes.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from typing import Any

import torch

from quantkit_kernels.backend import Verdict
from quantkit_kernels.bits import pack_bits
from quantkit_kernels.reference.wna16_linear import dequantize as reference_dequantize
from quantkit_kernels.stored import TABLES, Spec, Stored
from quantkit_kernels.triton import layout, scaled_selfcheck
from quantkit_kernels.triton.agreement import REPEATS, close, steady
from quantkit_kernels.triton.configs import Config, rule
from quantkit_kernels.triton.launch import DTYPES, chip, dequantize, launch
from quantkit_kernels.triton.layout import reads_by_row
from quantkit_kernels.triton.scaled_layout import NUMBERS

N, LEAST_K = 208, 1024  # three blocks of 64 rows and a ragged one; several trips of the loop for each split
_turn = threading.Lock()
_found: dict[tuple[Any, ...], str | None] = {}  # what the comparison said, by device and scheme
_warned: set[torch.device] = set()


def verdict(spec: Spec, device: torch.device, dtype: torch.dtype | None) -> Verdict:
    """The result of the comparison for a scheme, run once per process; warns at the first failure on a device.

    dtype: of the activations; None returns what is known for bf16 without running anything.
    """
    if dtype not in (None, *DTYPES):
        return Verdict(False, f"the Triton kernels take bf16 or fp16 activations, not {dtype}")
    if not torch.cuda.is_available():
        return Verdict(False, "no CUDA device is here to compare them with the reference on")
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    scheme = _scheme(spec, dtype or torch.bfloat16)
    with _turn:
        if (device, *scheme) not in _found:
            if dtype is None:
                return Verdict(True, "to be compared with the reference on this device before its first use")
            if torch.cuda.is_current_stream_capturing():
                return Verdict(
                    False, "not compared with the reference yet, and a CUDA graph is being captured"
                )
            _found[device, *scheme] = _complaint(device, *scheme)
        complaint = _found[device, *scheme]
    if complaint is None:
        return Verdict(True, "agrees with the reference on this device")
    return Verdict(False, complaint)


def _scheme(spec: Spec, dtype: torch.dtype) -> tuple[Any, ...]:
    """What decides which kernels run: the arguments of the comparison behind the device."""
    if spec.inputs != "float":
        return scaled_selfcheck.scheme(spec, dtype)
    cut = layout.geometry(spec.bits, spec.group_size, spec.k)
    return spec.number, cut.group, spec.symmetric, spec.k == cut.chunks * cut.chunk, dtype


def _complaint(device: torch.device, *scheme: Any) -> str | None:
    """The result of the comparison, or the error of the compiler or the launch."""
    try:
        products = scheme[0] in NUMBERS
        complaint = (scaled_selfcheck.compare if products else compare)(device, *scheme)
    except Exception as error:  # triton has its own types in each version, the driver others
        complaint = f"they fail on this device: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if complaint and device not in _warned:
        _warned.add(device)
        warnings.warn(f"the Triton kernels are not used on {device}: {complaint}", stacklevel=2)
    return complaint


@torch.no_grad()
def compare(
    device: torch.device, number: str, group: int, symmetric: bool, even: bool, dtype: torch.dtype
) -> str | None:
    """How the kernels differ from fp64 on `device`, or None. group: 0 for whole rows; even: K fills its chunks."""
    bits = TABLES.get(number) or int(number.removeprefix("int"))
    k = _columns(bits, group, even)
    group_size = group or k
    stored = _random_weight(Spec(number, bits, group_size, symmetric, N, k), dtype, device)
    w = reference_dequantize(stored, torch.float64)
    built = layout.build(stored, reads_by_row(device))
    g = torch.Generator().manual_seed(1)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for m, config, biased in _cases(device, bits, layout.geometry(bits, group_size, k)):
            x = torch.randn(m, k, generator=g).to(device, dtype)
            bias = torch.randn(N, generator=g).to(device) if biased else None
            truth = x.double() @ w.T + (0 if bias is None else bias.double())
            runs = [torch.full((m, N), torch.nan, dtype=dtype, device=device) for _ in range(REPEATS)]
            for y in runs:
                launch(x, *built, bias, bits, group_size, N, k, config, y)
            if not close(runs[0], truth):
                return f"{number} on {m} tokens is not what the reference computes on this device"
            if not steady(runs):
                return f"two runs of {number} on {m} tokens differ on this device"
        if not close(dequantize(*built, bits, group_size, N, k, dtype), w):
            return f"a weight in {number} written out is not the reference's on this device"
    return None


def _columns(bits: int, group: int, even: bool) -> int:
    """The first K of at least two groups from LEAST_K on that fills its last chunk, or does not."""
    chunk, step = layout.geometry(bits, group, 0).chunk, group or 32
    every = itertools.count(max(2, -(-LEAST_K // step)) * step, step)
    return next(k for k in every if (k % chunk == 0) == even)


def _cases(device: torch.device, bits: int, cut: layout.Geometry) -> list[tuple[int, Config, bool]]:
    """(tokens, tile sizes, with a bias): both heights of a tile, few and many tokens, split and not."""
    _, processors, major = chip(device)
    one, few, many = (rule(bits, m, N, cut, processors, major)._replace(splits=1) for m in (1, 16, 70))
    return [(1, one._replace(bn=128, splits=2), False), (16, few, True), (70, many, False)]


def _random_weight(spec: Spec, dtype: torch.dtype, device: torch.device) -> Stored:
    """A weight for which sums of K products of normal numbers come out around 1."""
    bits, g = spec.bits, torch.Generator().manual_seed(spec.bits)
    codes = torch.randint(0, 2**bits, (spec.n, spec.k), dtype=torch.uint8, generator=g)
    if not spec.integers:
        codes = torch.where(codes & 127 == 127, codes ^ 1, codes)  # without NaN
    scale = torch.randn(spec.n, spec.groups, generator=g) / (spec.k**0.5 * 2 ** (bits - 1))
    zero = torch.randint(0, 2**bits, (spec.groups, spec.n), dtype=torch.uint8, generator=g)
    zero_packed = None if spec.symmetric else pack_bits(zero, bits).T.contiguous().to(device)
    return Stored(pack_bits(codes, bits).to(device), scale.to(device, dtype), zero_packed, spec)
