"""Ops on packed weights. One schema per op, a plain-torch reference as default, other backends by name.

Knows tensors and numbers of bits, nothing of models, recipes or files.
"""

from quantkit_kernels.backends import BackendMissing, Choice, available, backends, prepare, run, select
from quantkit_kernels.bits import pack_bits, unpack_bits, words
from quantkit_kernels.ops import wna16_linear

__all__ = [
    "BackendMissing",
    "Choice",
    "available",
    "backends",
    "pack_bits",
    "prepare",
    "run",
    "select",
    "unpack_bits",
    "wna16_linear",
    "words",
]
