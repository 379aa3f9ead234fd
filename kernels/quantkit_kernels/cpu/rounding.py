"""Weights to codes on a given grid and back, with the bits that torch gives: see `qk_encode` and `qk_decode`."""

from __future__ import annotations

from typing import Any

import torch

from quantkit_kernels.cpu import library

INTEGERS, FP8, TABLE = range(3)  # QK_ENCODE_ of quantkit_cpu.h
CODES = 256  # that a table of values for decoding has
LEVELS = 32  # of a table for encoding, at most: the time goes with them


def encode_integers(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, qmax: int) -> torch.Tensor:
    """Codes uint8 [N, K] = clamp(rne(w / s), -zero, qmax - zero) + zero of w [N, K], with scale and zero [N, K/G].

    All are fp32, contiguous, on the CPU; zeros are whole numbers from 0 to qmax <= 255.
    """
    _check(w, scale)
    _plain("zero", zero, torch.float32, tuple(scale.shape))
    if not 0 < qmax < CODES:
        raise ValueError(f"qmax must be 1 to {CODES - 1}, not {qmax}")
    return _encoded(w, scale, INTEGERS, zero=zero.data_ptr(), qmax=qmax)


def encode_fp8(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, K] of the FP8 E4M3 numbers nearest to w / s, within -448..448; zero has the code 0.

    w [N, K], scale [N, K/G]: fp32, contiguous, on the CPU.
    """
    _check(w, scale)
    return _encoded(w, scale, FP8)


def encode_table(
    w: torch.Tensor, scale: torch.Tensor, edges: torch.Tensor, code_of: torch.Tensor
) -> torch.Tensor:
    """Codes uint8 [N, K]: code_of[how many edges are below w / s] of w [N, K], scale [N, K/G], both fp32.

    edges: fp32 [L - 1], rising. code_of: uint8 [L], of at most LEVELS levels. All contiguous, on the CPU.
    """
    _check(w, scale)
    levels = code_of.numel()
    if not 1 <= levels <= LEVELS:
        raise ValueError(f"a table has 1 to {LEVELS} levels, not {levels}")
    _plain("code_of", code_of, torch.uint8, (levels,))
    _plain("edges", edges, torch.float32, (levels - 1,))
    return _encoded(w, scale, TABLE, edges=edges.data_ptr(), code_of=code_of.data_ptr(), levels=levels)


def decode(codes: torch.Tensor, scale: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Weights fp32 [N, K] = values[code] * s of codes uint8 [N, K], scale fp32 [N, K/G], values fp32 [256].

    All contiguous, on the CPU.
    """
    return _decoded(codes, scale, values, {})


def compare(
    codes: torch.Tensor, scale: torch.Tensor, values: torch.Tensor, original: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(`decode`, sums [N] of (decoded - original)^2, sums [N] of original^2) of every row of original fp32 [N, K]."""
    _plain("original", original, torch.float32, tuple(codes.shape))
    error, norm = torch.empty(len(codes)), torch.empty(len(codes))
    at = {"original": original.data_ptr(), "error": error.data_ptr(), "norm": norm.data_ptr()}
    return _decoded(codes, scale, values, at), error, norm


def _decoded(
    codes: torch.Tensor, scale: torch.Tensor, values: torch.Tensor, more: dict[str, int]
) -> torch.Tensor:
    n, k = _grouped("codes", codes, torch.uint8, scale)
    _plain("values", values, torch.float32, (CODES,))
    w = torch.empty(n, k)
    at = {
        "codes": codes.data_ptr(),
        "scale": scale.data_ptr(),
        "values": values.data_ptr(),
        "w": w.data_ptr(),
    }
    facts = library.Decoding(**at, **more, n=n, k=k, group=k // scale.shape[1])
    library.required().qk_decode(facts, torch.get_num_threads())
    return w


def _encoded(w: torch.Tensor, scale: torch.Tensor, kind: int, **more: Any) -> torch.Tensor:
    codes, (n, k) = torch.empty(w.shape, dtype=torch.uint8), w.shape
    at = {"w": w.data_ptr(), "scale": scale.data_ptr(), "codes": codes.data_ptr()}
    facts = library.Encoding(**at, n=n, k=k, group=k // scale.shape[1], kind=kind, **more)
    library.required().qk_encode(facts, torch.get_num_threads())
    return codes


def _check(w: torch.Tensor, scale: torch.Tensor) -> None:
    _grouped("w", w, torch.float32, scale)


def _grouped(name: str, matrix: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> tuple[int, int]:
    """The sizes [N, K] of a matrix whose groups have these scales; ValueError if they do not fit."""
    if matrix.dim() != 2 or scale.dim() != 2 or not matrix.numel() or not scale.numel():
        raise ValueError(
            f"{name} is [N, K] and scale [N, K/G], got {list(matrix.shape)} and {list(scale.shape)}"
        )
    n, k = matrix.shape
    _plain(name, matrix, dtype, (n, k))
    if k % scale.shape[1]:
        raise ValueError(f"{k} columns do not divide into {scale.shape[1]} groups")
    _plain("scale", scale, torch.float32, (n, scale.shape[1]))
    return n, k


def _plain(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """ValueError unless native code can read this tensor."""
    fits = tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.is_contiguous()
    if not fits or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be contiguous {dtype} {list(shape)} on the CPU, got {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}"
        )
