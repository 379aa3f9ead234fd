"""Ops on packed weights: one schema per op, a plain-torch reference as default, other backends by name.

A weight is a `Stored`: canonical tensors and the `Spec` that says what they mean. `select` names the backend that runs
it on a device; `backend(name)` prepares its layout and binds it to a call. Nothing here depends on models or files.
"""

from quantkit_kernels.backend import Backend, BackendMissing, Call, GroupedCall
from quantkit_kernels.backends import Choice, available, backend, backends, select
from quantkit_kernels.bits import pack_bits, unpack_bits, words
from quantkit_kernels.ops import wna16_linear
from quantkit_kernels.stored import INPUTS, InputRange, Layout, Spec, Stored

__all__ = [
    "INPUTS",
    "Backend",
    "BackendMissing",
    "Call",
    "Choice",
    "GroupedCall",
    "InputRange",
    "Layout",
    "Spec",
    "Stored",
    "available",
    "backend",
    "backends",
    "pack_bits",
    "select",
    "unpack_bits",
    "wna16_linear",
    "words",
]
