"""Find and load the native library, once, and declare the types of its C functions."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import weakref
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch  # first: the library then shares torch's OpenMP pool

ENVIRONMENT = "QUANTKIT_ISA"
LIBRARY = "QUANTKIT_CPU_LIBRARY"  # another build of the library, for tests
SLOWER = "decode on the CPU is about 15 times slower"
ADVICE = "install a C++17 compiler with OpenMP, then quantkit again (`quantkit kernels` shows what is built)"
ISAS = ("portable", "avx2", "avx512", "amx")


class Weight(ctypes.Structure):
    """`qk_weight` of quantkit_cpu.h."""

    _fields_ = [
        ("units", c_void_p),
        ("bias", c_void_p),
        ("scale_factor", c_float),
        ("n", c_int32),
        ("k", c_int32),
        ("group", c_int32),
        ("bits", c_int32),
        ("scale_type", c_int32),
        ("table", c_int32),
        ("input_scale", c_float),
        ("input_zero", c_int32),
    ]


class Range(ctypes.Structure):
    """`qk_range` of quantkit_cpu.h."""

    _fields_ = [
        ("w", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("column", c_void_p),
        ("error", c_void_p),
        ("groups", c_int64),
        ("group", c_int64),
        ("candidates", c_int64),
        ("column_groups", c_int64),
        ("qmax", c_float),
    ]


class Grouped(ctypes.Structure):
    """`qk_grouped` of quantkit_cpu.h."""

    _fields_ = [
        ("weights", c_void_p),
        ("offsets", c_void_p),
        ("rows", c_void_p),
        ("slots", c_int64),
        ("count", c_int32),
        ("each", c_int32),
    ]


class Columns(ctypes.Structure):
    """`qk_columns` of quantkit_cpu.h."""

    _fields_ = [
        *[(name, c_void_p) for name in ("value", "gradient", "matrix", "scale", "low", "high", "group_of")],
        *[(name, c_void_p) for name in ("first_out", "second_out")],
        *[(name, c_int64) for name in ("weights", "columns", "rows", "groups", "each", "row")],
        *[(name, c_int64) for name in ("gradient_each", "gradient_row")],
    ]


class Encoding(ctypes.Structure):
    """`qk_encoding` of quantkit_cpu.h."""

    _fields_ = [
        ("w", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("edges", c_void_p),
        ("code_of", c_void_p),
        ("codes", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("group", c_int64),
        ("kind", c_int32),
        ("levels", c_int32),
        ("qmax", c_float),
    ]


class Decoding(ctypes.Structure):
    """`qk_decoding` of quantkit_cpu.h."""

    _fields_ = [
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("values", c_void_p),
        ("original", c_void_p),
        ("w", c_void_p),
        ("error", c_void_p),
        ("norm", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("group", c_int64),
    ]


_WEIGHT = POINTER(Weight)
_FUNCTIONS = {  # name: (result, arguments)
    "qk_linear": (c_int, [_WEIGHT, c_void_p, c_int, c_int64, c_int, c_void_p, c_int, c_int]),
    "qk_grouped_linear": (
        c_int,
        [POINTER(Grouped), c_void_p, c_int, c_int64, c_int, c_void_p, c_int, c_int],
    ),
    "qk_weight_bytes": (c_size_t, [_WEIGHT]),
    "qk_pack": (None, [_WEIGHT, c_void_p, c_void_p, c_void_p, c_void_p]),
    "qk_unpack": (None, [_WEIGHT, c_void_p, c_void_p, c_void_p]),
    "qk_isa": (c_int, []),
    "qk_isa_available": (c_int, [c_int]),
    "qk_set_isa": (c_int, [c_int]),
    "qk_isa_name": (c_char_p, [c_int]),
    "qk_cpu_flags": (c_char_p, []),
    "qk_sources": (c_char_p, []),
    "qk_range_errors": (None, [POINTER(Range), c_int]),
    "qk_spread": (None, [POINTER(Columns), c_int]),
    "qk_descend": (None, [POINTER(Columns), c_int]),
    "qk_encode": (None, [POINTER(Encoding), c_int]),
    "qk_decode": (None, [POINTER(Decoding), c_int]),
    "qk_kv_attend": (c_int, [c_void_p, c_int]),
    "qk_arena_new": (c_void_p, [c_size_t]),
    "qk_arena_free": (None, [c_void_p]),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None if the installation was built without it."""
    path = Path(os.environ.get(LIBRARY) or Path(__file__).with_name("_quantkit_cpu.so"))
    return open_library(path) if path.exists() else None


def open_library(path: Path) -> ctypes.CDLL:
    """Load the library at `path` and declare the types of its functions.

    OSError if it was built from other sources than those beside this file: its structs may be others.
    """
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "qk_sources"):
        raise _stale(path)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if library.qk_sources().decode() not in ("", sources_digest()):
        raise _stale(path)
    return library


def sources_digest() -> str:
    """Of the C++ files beside this one, as setup.py gives it to the library."""
    digest, here = hashlib.sha256(), Path(__file__).parent
    for file in sorted([*here.glob("*.cpp"), *here.glob("*.h")], key=lambda file: file.name):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _stale(path: Path) -> OSError:
    what = "was built from other sources than those installed; install quantkit again"
    return OSError(errno.ENOEXEC, what, str(path))


def available() -> bool:
    """Whether the native kernels are built."""
    return load() is not None


def isa() -> str:
    """The instruction set path in use; RuntimeError if QUANTKIT_ISA names one that cannot run here."""
    library = required()
    number = library.qk_isa()
    if number < 0:
        able = ", ".join(name for i, name in enumerate(ISAS) if library.qk_isa_available(i))
        raise RuntimeError(
            f"{ENVIRONMENT}={os.environ.get(ENVIRONMENT)!r} cannot run on this CPU ({flags()}); it has: {able}"
        )
    return ISAS[number]


def set_isa(name: str) -> None:
    """Select a path for the whole process from now on."""
    if name not in ISAS or required().qk_set_isa(ISAS.index(name)) != 0:
        raise RuntimeError(f"instruction set path {name!r} cannot run on this CPU ({flags()})")


def flags() -> str:
    """Vendor, family and instruction sets found."""
    found: bytes = required().qk_cpu_flags()
    return found.decode()


def required() -> ctypes.CDLL:
    """The library; RuntimeError if it is not built."""
    library = load()
    if library is None:
        raise RuntimeError(f"the native CPU kernels are not built; {ADVICE}")
    return library


class Arena:
    """One piece of memory in huge pages, handed out in 64-byte aligned pieces; freed with its last tensor."""

    def __init__(self, size: int) -> None:
        if not 0 < size < 1 << 62:
            raise ValueError(f"an arena has 1 byte or more, and fewer than 2^62, got {size}")
        library = required()
        start = library.qk_arena_new(size)
        if not start:
            raise MemoryError(f"no memory for an arena of {size} bytes")
        buffer = (ctypes.c_uint8 * size).from_address(start)
        weakref.finalize(buffer, library.qk_arena_free, start).atexit = False
        self._bytes = torch.frombuffer(buffer, dtype=torch.uint8)
        self._used = 0

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a uint8 tensor [B] in the arena."""
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_cpu:
            raise ValueError(
                f"an arena holds uint8 [B] on the CPU, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        end = self._used + tensor.numel()
        if end > self._bytes.numel():
            raise ValueError(
                f"{tensor.numel()} bytes do not fit: {self._bytes.numel() - self._used} are left"
            )
        there = self._bytes[self._used : end]
        there.copy_(tensor)
        self._used = -(-end // 64) * 64
        return there
