"""Ops on packed weights. One schema per op, a plain-torch reference as default, other backends by name.

Knows tensors and numbers of bits, nothing of models, recipes or files.
"""

from quantkit_kernels.backends import (
    COMPUTES,
    BackendMissing,
    Choice,
    available,
    backends,
    check_compute,
    prepare,
    restore,
    run,
    select,
)
from quantkit_kernels.bits import pack_bits, unpack_bits, words
from quantkit_kernels.ops import wna16_linear

__all__ = [
    "COMPUTES",
    "BackendMissing",
    "Choice",
    "available",
    "backends",
    "check_compute",
    "pack_bits",
    "prepare",
    "restore",
    "run",
    "select",
    "unpack_bits",
    "wna16_linear",
    "words",
]
