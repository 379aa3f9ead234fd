"""Ops on packed weights. One schema per op, a plain-torch reference as default, other backends by name.

Knows tensors and numbers of bits, nothing of models, recipes or files.
"""

from quantkit_kernels.backends import BACKENDS, BackendMissing, Choice, available, prepare, select
from quantkit_kernels.bits import pack_bits, unpack_bits
from quantkit_kernels.ops import wna16_linear

__all__ = [
    "BACKENDS",
    "BackendMissing",
    "Choice",
    "available",
    "pack_bits",
    "prepare",
    "select",
    "unpack_bits",
    "wna16_linear",
]
