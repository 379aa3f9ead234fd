"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
from functools import cache


@cache
def _trim() -> object:
    try:
        return ctypes.CDLL(None).malloc_trim  # glibc's; other C libraries have none
    except (AttributeError, OSError, TypeError):
        return None


def give_back() -> None:
    """Return freed heap pages.

    glibc keeps blocks of up to 32 MB for itself once it has seen them freed. A calibrated block frees many and then
    asks for large matrices, so the peak would be the sum of both.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
