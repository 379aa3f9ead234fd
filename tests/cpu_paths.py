"""Where the native CPU kernels can run: the paths of this machine, and those it lacks as scalar twins of their
intrinsics (the same sources, built with -DQK_EMULATE). The fixture `path` (kernels/conftest.py) goes through them."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from quantkit_kernels.cpu import library

SOURCES = Path(library.__file__).parent
NATIVE = [
    name for i, name in enumerate(library.ISAS) if library.available() and library.load().qk_isa_available(i)
]
PATHS = [*NATIVE, "emulated-avx512", "emulated-amx"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def build_emulated(out: Path):
    """The library with AVX-512 and AMX emulated. QUANTKIT_CXXFLAGS: more flags, for sanitizers."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("needs g++")
    flags = "-DQK_EMULATE -O1 -std=c++17 -ffp-contract=off -fopenmp -fPIC"
    warnings = "-Wall -Wextra -Werror -Wno-unused-function -Wno-psabi"
    command = [compiler, *flags.split(), *warnings.split(), *os.environ.get("QUANTKIT_CXXFLAGS", "").split()]
    names = (
        "layout",
        "dispatch",
        "selfcheck",
        "linear_portable",
        "linear_avx512",
        "linear_amx",
        "grouped",
        "columns",
        "range_errors",
        "rounding",
        "kv_pages",
        "decode_portable",
        "decode_avx512",
    )

    def build(name):
        subprocess.run([*command, "-c", SOURCES / f"{name}.cpp", "-o", out / f"{name}.o"], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, names))
    subprocess.run(
        [*command, "-shared", "-o", out / "lib.so", *(out / f"{name}.o" for name in names)], check=True
    )
    return library.open_library(out / "lib.so")


def assert_close(name, found, truth, limit):
    """RMS error relative to the RMS of the fp64 truth, and the largest error."""
    rms = truth.square().mean().sqrt()
    error = (found.double() - truth).square().mean().sqrt() / rms
    worst = (found.double() - truth).abs().max() / rms
    assert error <= limit, f"{name}: relative RMS error {error:.3g}"
    assert worst <= 8 * limit, f"{name}: relative largest error {worst:.3g}"
