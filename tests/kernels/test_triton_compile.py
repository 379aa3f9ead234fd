"""The Triton kernels compiled for sm_80, sm_90, sm_100 and gfx942, without a GPU: registers, spills, shared memory and
instructions per weight of what the rule of `configs.py` would launch.

An H200 receives 36 four-bit weights per clock and multiprocessor at 4.3 TB/s and issues 128 lane instructions: 3.56 per
weight at 4 bits, 6.9 at 8, 2.7 at 3 and 1.8 at 2 is what memory-bound tiles (M <= 32) have; with more tokens the tensor
cores set the limit. 2 and 3 bits need more than that, and so do 4 bits on sm_100 (2.25): half an instruction is the
exact subtraction of the zero point, a fifth are descriptors and barriers of the tensor cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compile")]  # one process compiles everything

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 942: 64 << 10}
# (arch, bits, activations, zeros, fp8, group, M, N, K), most instructions per weight
CASES = [
    ((90, 4, "bf16", False, False, 128, 1, 4096, 4096), 2.65),
    ((90, 4, "bf16", True, False, 128, 16, 28672, 4096), 2.75),
    ((90, 4, "fp16", True, False, 64, 8, 4096, 14336), 2.85),
    ((90, 4, "bf16", True, False, 128, 64, 28672, 4096), 3.95),
    ((90, 4, "bf16", False, False, 128, 128, 28672, 4096), 5.25),
    ((90, 8, "bf16", True, False, 128, 16, 4096, 4096), 4.3),
    ((90, 8, "bf16", False, True, 128, 16, 4096, 4096), 4.05),
    ((90, 8, "bf16", True, False, 128, 64, 28672, 4096), 5.4),
    ((90, 2, "bf16", False, False, 128, 16, 4096, 4096), 2.3),
    ((90, 2, "bf16", True, False, 128, 16, 4096, 4096), 2.4),
    ((90, 2, "bf16", True, False, 128, 128, 28672, 4096), 3.6),
    ((90, 3, "bf16", True, False, 128, 16, 4096, 4096), 3.1),
    ((80, 4, "bf16", True, False, 128, 16, 4096, 4096), 3.5),
    ((80, 4, "bf16", False, False, 128, 64, 4096, 4096), 7.0),
    ((80, 8, "fp16", False, True, 128, 16, 4096, 4096), 5.1),
    ((100, 4, "bf16", True, False, 128, 16, 28672, 4096), 3.05),
    ((100, 8, "bf16", False, False, 128, 16, 4096, 4096), 3.7),
    ((100, 2, "bf16", True, False, 128, 16, 28672, 4096), 2.65),
]


# 8-bit products: (arch, number, activations, a zero point, group, M, N, K); a cache: (arch, number, activations, stored
# scales, softcap, query heads per kv head, head dim). Most instructions per weight, or per number of the cache.
EIGHT_BITS = [
    (("scaled", 80, "int8", "bf16", False, 4096, 1, 4096, 4096), 2.4),
    (("scaled", 80, "int8", "bf16", True, 4096, 16, 4096, 4096), 0.8),
    (("scaled", 90, "int8", "bf16", False, 4096, 1, 4096, 4096), 2.5),
    (("scaled", 90, "int8", "bf16", True, 4096, 16, 4096, 4096), 0.9),
    (("scaled", 90, "int8", "bf16", False, 4096, 1024, 4096, 4096), 1.6),
    (("scaled", 90, "fp8_e4m3", "bf16", False, 4096, 16, 4096, 4096), 0.9),
    (("scaled", 90, "fp8_e4m3", "bf16", False, 4096, 1024, 4096, 4096), 1.6),
    (("scaled", 90, "fp8_e4m3", "bf16", False, 128, 64, 4096, 4096), 3.2),
    (("scaled", 90, "fp8_e4m3", "bf16", False, 4096, 1, 4096, 4096), 2.0),
    (("scaled", 90, "fp8_e4m3", "bf16", False, 128, 1, 4096, 4096, 128), 1.45),
    (("scaled", 90, "fp8_e4m3", "fp16", False, 128, 1024, 4096, 4096, 128), 4.4),
    (("scaled", 90, "int8", "fp16", True, 4096, 1, 4096, 4096), 0.9),
    (("scaled", 100, "fp8_e4m3", "bf16", False, 4096, 1, 4096, 4096), 2.05),
    (("scaled", 100, "fp8_e4m3", "bf16", False, 128, 16, 4096, 4096, 128), 1.5),
    (("scaled", 100, "int8", "bf16", False, 4096, 16, 4096, 4096), 0.95),
    (("scaled", 100, "fp8_e4m3", "bf16", False, 4096, 1024, 4096, 4096), 1.9),
    (("decode", 80, "int8", "bf16", False, False, 4, 128), 8.0),
    (("decode", 90, "int8", "bf16", False, False, 4, 128), 7.6),
    (("decode", 90, "int8", "fp16", False, True, 8, 128), 8.4),
    (("decode", 90, "fp8_e4m3", "bf16", True, False, 4, 128), 7.0),
    (("decode", 100, "fp8_e4m3", "bf16", True, False, 4, 128), 5.4),
]

# The experts of a mixture: (arch, bits, activations, zeros, fp8, group, slots, N, K, experts)
GROUPED = [
    (("grouped", 80, 4, "bf16", True, False, 128, 8, 1536, 2048, 64), 3.8),
    (("grouped", 90, 4, "bf16", False, False, 128, 8, 1536, 2048, 64), 3.2),
    (("grouped", 90, 8, "bf16", False, True, 128, 4096, 2048, 768, 64), 5.0),
    (("grouped", 100, 4, "bf16", True, False, 128, 1024, 1536, 2048, 128), 3.05),
]

# What rounds: entries of a cache (arch, number, their type, stored scales, head dim), and inputs (arch, number, their
# type, columns per scale or 0, a stored scale, a zero point).
ROUNDING = [
    *(("write", arch, "int8", "bf16", False, 128) for arch in (80, 90, 100)),
    *(("write", arch, "fp8_e4m3", "fp16", True, 128) for arch in (80, 90, 100)),
    ("quantize", 80, "int8", "bf16", 0, False, False),
    ("quantize", 80, "int8", "fp16", 0, True, True),
    ("quantize", 90, "int8", "bf16", 0, True, True),
    *(("quantize", arch, "fp8_e4m3", "bf16", 0, True, False) for arch in (90, 100)),
    *(("quantize", arch, "fp8_e4m3", "bf16", 128, False, False) for arch in (90, 100)),
]

# GPTQ's loops: (arch, loop, columns of a block)
COLUMNS = [
    *(("columns", arch, name, 128) for arch in (80, 90, 100) for name in ("spread", "descend")),
    ("columns", 90, "spread", 256),
]

AMD = [
    (942, 4, "bf16", True, False, 128, 16, 4096, 4096),
    (942, 8, "fp16", False, True, 128, 128, 4096, 4096),
]


@pytest.fixture(scope="module")
def reports():
    """What the child process says about every case."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    child = [sys.executable, str(Path(__file__).with_name("triton_compiled.py"))]
    linears = [case for case, _ in CASES] + AMD
    eights = [case for case, _ in EIGHT_BITS + GROUPED] + ROUNDING + COLUMNS
    cases = [("linear", *case) for case in linears] + eights
    done = subprocess.run(
        child, env=environment, input=json.dumps(cases), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(linears + eights, found, strict=True))


@pytest.mark.parametrize(
    ("case", "limit"), CASES, ids=lambda v: "-".join(map(str, v)) if type(v) is tuple else ""
)
def test_compiled_kernel_fits(reports, case, limit):
    report = reports[case]
    assert report["stack"] == 0, report
    assert report["shared"] <= SHARED[case[0]], report
    assert report["tensor"] >= 2, report
    assert 1 < report["per_weight"] <= limit, report
    assert report["late_loads"] == 0, report  # nothing in the loop waits for memory: all is copied ahead
    if case[0] == 90:  # weights go from registers to the tensor cores
        assert report["from_registers"], report
    if case[6] <= 16:  # two programs of four warps on a multiprocessor
        assert report["registers"] <= 224, report


@pytest.mark.parametrize(
    ("case", "limit"), EIGHT_BITS + GROUPED, ids=lambda v: "-".join(map(str, v)) if type(v) is tuple else ""
)
def test_compiled_kernels_of_8_bits_and_of_experts_fit(reports, case, limit):
    report = reports[case]
    assert report["stack"] == 0, report
    assert report["shared"] <= SHARED[case[1]], report
    assert report["tensor"] >= 2, report
    assert 0.1 < report["per_weight"] <= limit, report
    assert report["late_loads"] == 0, report


@pytest.mark.parametrize("case", ROUNDING, ids=lambda v: "-".join(map(str, v)))
def test_compiled_rounding_fits(reports, case):
    assert reports[case]["stack"] == 0, reports[case]
    assert reports[case]["registers"] <= 128, reports[case]
    assert reports[case]["shared"] <= SHARED[case[1]], reports[case]


@pytest.mark.parametrize("case", COLUMNS, ids=lambda v: "-".join(map(str, v)))
def test_compiled_column_loop_fits(reports, case):
    """The tile stays in registers."""
    assert reports[case]["stack"] == 0, reports[case]
    assert reports[case]["registers"] <= 255, reports[case]
    assert reports[case]["shared"] <= SHARED[case[1]], reports[case]


@pytest.mark.parametrize("case", AMD, ids=lambda v: "-".join(map(str, v)))
def test_compiled_kernel_fits_amd(reports, case):
    """Without assembly, only that it compiles and fits."""
    assert reports[case]["stack"] == 0
    assert reports[case]["shared"] <= SHARED[case[0]], reports[case]


def test_a_zero_point_costs_next_to_nothing(reports):
    plain, zeros = (reports[case]["per_weight"] for case, _ in CASES[:2])
    assert zeros <= plain * 1.1
