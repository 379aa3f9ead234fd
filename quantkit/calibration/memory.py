"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGE = 8 << 20
KEPT = 64 << 20  # free bytes at the end of the heap that are not given back by themselves


@cache
def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's malloc; None where the C library has none."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return function


def large_blocks_apart() -> None:
    """Blocks of 8 MiB and more get pages of their own, from now on, and go back as soon as they are freed.

    glibc begins with that at 128 KiB but raises the limit by itself, up to 32 MiB, with every such block it sees
    freed. Matrices then lie in the heap between what outlives them, and the peak grows a little from block to block.
    Smaller ones stay in the heap: faulting their pages in each time costs as much as the products.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Return freed heap pages.

    A calibrated block frees many of up to 8 MiB (32 without `large_blocks_apart`) and then asks for large matrices, so
    the peak would be the sum of both.
    """
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)
