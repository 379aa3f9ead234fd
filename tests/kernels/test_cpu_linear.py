"""The native CPU kernels against fp64, and every instruction set path against every other.

Paths that this machine lacks run as scalar twins of their intrinsics: the same sources, built with -DQK_EMULATE.
"""

import gc
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
from cpu_paths import DTYPES, SOURCES, assert_close
from packed_weights import packed_weight, same, stored
from quantkit_kernels import Spec, Stored
from quantkit_kernels.cpu import layout, library, ops
from racing import race

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")


def facts(weight, compute=ops.FLOAT):
    """The op's arguments after the bias."""
    spec = weight.spec
    kind = (spec.bits, spec.group_size, spec.n, spec.k, spec.symmetric)
    return (*kind, compute, weight.scale_factor, weight.scale_type)


def run(weight, x, compute=ops.FLOAT, bias=None):
    """What the bare call leaves in memory that held NaN, and the op as well, through the dispatcher and past it."""
    poison = torch.full((x.shape[0], weight.spec.n), float("nan"), dtype=x.dtype)
    ops.run(x, weight, compute, poison, bias)
    y = ops.cpu_linear(x, weight.units, bias, *facts(weight, compute))
    for found in (y, ops.linear(weight, x, bias, compute), ops.bind(weight, x.dtype, compute)(x, bias)):
        torch.testing.assert_close(found, poison, rtol=0, atol=0, equal_nan=True)
    return y


def int8_twin(x, group, per_token):
    """The formula of compute int8 in fp64: x quantized per token and chunk of min(group, 128) columns."""
    m, k = x.shape
    x = x.float()
    chunk = group if group in (32, 64) and group != k else 128
    blocks = torch.nn.functional.pad(x, (0, -k % chunk)).view(m, -1, chunk)
    most = blocks.abs().amax(-1, keepdim=True)
    if per_token:
        most = most.amax(1, keepdim=True).expand_as(most)
    inverse = torch.full_like(most, 127) / most  # `127 / most` would be a reciprocal and a product
    q = (blocks * torch.where(most > 0, inverse, 0)).round().double()
    return (q * (most / 127).double()).view(m, -1)[:, :k]


SHAPES = [(16, 128), (17, 384), (50, 640)]
GROUPS = (32, 64, 128, 0)  # 0: per channel


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_float_is_close_to_fp64(path, bits, group, symmetric):
    for (n, k), m, dtype in zip(SHAPES * 2, (1, 2, 3, 8, 16, 33), DTYPES * 2, strict=True):
        packed, w = packed_weight(bits, n, k, group or k, symmetric)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(n)) if m % 2 else None
        y = run(layout.pack(packed), x, bias=bias)
        limit = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
        truth = x.double() @ w.T + (0 if bias is None else bias.double())
        assert_close(f"{path} {bits} bits g{group} [{n}, {k}] m={m} {dtype}", y, truth, limit)


@pytest.mark.parametrize("m", [1, 5, 24])
def test_fp32_that_stands_for_halves_is_closer_than_halves(path, m):
    """15 bits of each activation; on AMX bf16 tiles, whose result is that of rounding first."""
    packed, w = packed_weight(4, 40, 256, 128, False)
    weight = layout.pack(packed)
    x = torch.randn(m, 256, generator=torch.Generator().manual_seed(1))
    y = run(weight, x, ops.HALVES)
    assert_close(path, y, x.double() @ w.T, 4e-3 if "amx" in path and m >= 16 else 1e-4)
    rounded = run(weight, x.bfloat16().float(), ops.HALVES)
    assert torch.equal(rounded.bfloat16(), run(weight, x.bfloat16(), ops.FLOAT))


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("compute", [ops.HALVES, ops.INT8_GROUP])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(path, bits, compute, sign):
    codes = torch.full((16, 256), 2**bits - 1, dtype=torch.uint8)
    weight = layout.pack(stored(codes, torch.ones(16, 2).half(), None, bits))
    for m in (1, 2, 4, 16):
        x = torch.full((m, 256), 1.9999 * sign)
        truth = x.double().sum(1, keepdim=True).expand(m, 16) * (2**bits - 1 - 2 ** (bits - 1))
        assert_close(f"{path} {bits} bits m={m}", run(weight, x, compute), truth, 5e-3)


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("compute", [ops.INT8_GROUP, ops.INT8_TOKEN])
def test_int8_is_its_formula(path, bits, group, compute):
    for (n, k), m, dtype in zip(SHAPES * 2, (1, 2, 3, 8, 16, 33), DTYPES * 2, strict=True):
        packed, w = packed_weight(bits, n, k, group or k, False)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        x[0, : k // 2] = 0
        y = run(layout.pack(packed), x, compute)
        rounded = int8_twin(x, group or k, compute == ops.INT8_TOKEN)
        limit = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}[dtype]
        assert_close(f"{path} {bits} bits g{group} [{n}, {k}] m={m} {dtype}", y, rounded @ w.T, limit)


@pytest.mark.parametrize("bits", layout.BITS)
def test_rows_of_any_length_per_channel(path, bits):
    for n, k in ((3, 1), (17, 101), (16, 130), (33, 31)):
        packed, w = packed_weight(bits, n, k, k, False)
        weight = layout.pack(packed)
        assert same(layout.unpack(weight), packed)
        x = torch.randn(9, k, generator=torch.Generator().manual_seed(k))
        assert_close(f"{bits} bits [{n}, {k}]", run(weight, x), x.double() @ w.T, 1e-6)
        rounded = int8_twin(x, k, False)
        assert_close(f"{bits} bits [{n}, {k}]", run(weight, x, ops.INT8_GROUP), rounded @ w.T, 2e-6)


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_layout_converts_back_exactly(bits, group, scale_dtype):
    for n, k in (*SHAPES, (5, 256)):
        for symmetric in (True, False):
            packed, _ = packed_weight(bits, n, k, group or k, symmetric, scale_dtype)
            weight = layout.pack(packed)
            assert (weight.scale_type == layout.F32) == (scale_dtype == torch.float32)
            assert same(layout.unpack(weight), packed)


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("compute", [ops.FLOAT, ops.INT8_GROUP])
def test_every_path_gives_the_bits_of_the_portable_one(path, bits, compute):
    for group in GROUPS:
        for m, dtype in zip(
            (1, 3, 11, 40), (torch.bfloat16, torch.float32, torch.float16, torch.float16), strict=True
        ):
            weight = layout.pack(packed_weight(bits, 21, 384, group or 384, False)[0])
            x = torch.randn(m, 384, generator=torch.Generator().manual_seed(m)).to(dtype)
            y = run(weight, x, compute)
            library.set_isa("portable")
            expected = run(weight, x, compute)
            library.set_isa(path.removeprefix("emulated-"))
            assert torch.equal(y, expected), f"{bits} bits g{group} m={m} {dtype}"


def test_a_nan_or_an_infinity_reaches_its_own_token_only(path):
    weight = layout.pack(packed_weight(4, 32, 256, 128, False)[0])
    for compute in (ops.FLOAT, ops.INT8_GROUP, ops.INT8_TOKEN):
        for m, dtype in ((3, torch.float32), (20, torch.bfloat16)):
            for bad in (float("nan"), float("inf")):
                x = torch.ones(m, 256, dtype=dtype)
                x[1, 130] = bad
                finite = run(weight, x, compute).isfinite()
                assert finite[[0, 2]].all()
                assert not finite[1].all()
                assert bad == float("inf") or not finite[1].any()


def test_zero_tokens_and_more_dimensions(path):
    weight = layout.pack(packed_weight(4, 20, 64, 32, True)[0])
    rest = (weight.units, None, *facts(weight))
    assert ops.cpu_linear(torch.ones(0, 64), *rest).shape == (0, 20)
    x = torch.randn(3, 2, 128)[..., ::2]
    assert torch.equal(ops.cpu_linear(x, *rest).view(6, 20), run(weight, x.reshape(6, 64).contiguous()))


def test_schemes_that_do_not_fit_are_refused():
    packed, _ = packed_weight(4, 20, 96, 48, True)
    with pytest.raises(ValueError, match="groups of 32, 64, multiples of 128 or whole rows, not 48"):
        layout.pack(packed)
    assert "not 5" in layout.refuses(Spec.integer(5, 128, True, 16, 256))
    assert layout.refuses(Spec.integer(3, None, True, 16, 256)) is None
    with pytest.raises(ValueError, match=r"scale of a 4-bit \[20, 96\] weight is \(20, 2\)"):
        Stored(packed.packed, packed.scale[:19], None, packed.spec)
    weight = layout.pack(packed_weight(4, 20, 64, 32, True)[0])
    with pytest.raises(ValueError, match="units of a 4-bit"):
        ops.cpu_linear(torch.ones(1, 64), weight.units[1:], None, 4, 32, 20, 64, True, 0, 1.0, 0)
    with pytest.raises(ValueError, match="x has 32 features"):
        ops.cpu_linear(torch.ones(1, 32), weight.units, None, 4, 32, 20, 64, True, 0, 1.0, 0)
    with pytest.raises(ValueError, match="bias must be contiguous fp32"):
        ops.cpu_linear(torch.ones(1, 64), weight.units, torch.ones(20).half(), 4, 32, 20, 64, True, 0, 1.0, 0)


def test_a_bound_call_refuses_what_the_op_refuses():
    weight = layout.pack(packed_weight(4, 20, 64, 32, True)[0])
    call = ops.bind(weight, torch.float32)
    with pytest.raises(ValueError, match="x has 32 features, the weight takes 64"):
        call(torch.ones(1, 32), None)
    with pytest.raises(ValueError, match=r"bias must be contiguous fp32 \[20\]"):
        call(torch.ones(1, 64), torch.ones(21))
    with pytest.raises(ValueError, match="units of a 4-bit"):
        ops.bind(weight._replace(units=weight.units[1:]), torch.float32)
    with pytest.raises(TypeError, match="x must be fp32, bf16 or fp16"):
        ops.linear(weight, torch.ones(1, 64).double())


def test_isa_is_forced_by_the_environment():
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).qk_isa())"
    where = os.environ.get(library.LIBRARY) or SOURCES / "_quantkit_cpu.so"

    def isa(name):
        environment = {**os.environ, library.ENVIRONMENT: name}
        done = subprocess.run(
            [sys.executable, "-c", code, where], env=environment, capture_output=True, check=True
        )
        return int(done.stdout)

    able = library.load().qk_isa_available
    assert [isa(name) for name in library.ISAS] == [i if able(i) else -1 for i in range(4)]
    assert isa("mmx") == -1
    assert isa("") == max(i for i in range(4) if able(i))


def test_a_library_of_other_sources_is_refused(tmp_path, monkeypatch):
    """Its structs may be others; one that has no digest was built by hand, for tests."""
    installed = SOURCES / "_quantkit_cpu.so"
    assert library.open_library(installed).qk_sources().decode() == library.sources_digest()
    monkeypatch.setattr(library, "sources_digest", lambda: "0" * 16)
    with pytest.raises(OSError, match="built from other sources") as error:
        library.open_library(installed)
    assert error.value.filename == str(installed)


def test_a_path_that_computes_something_else_is_found_out(tmp_path):
    """The last bit of one output of one token is wrong, or one of a table by a thousandth, or its rare codes."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    (tmp_path / "main.cpp").write_text(
        """
#include "linear.h"
namespace qk {
size_t scratch_bytes(const Weight &w, int64_t m, int compute) { return bytes_of(describe(w, F32, m, compute, false)); }
}
using namespace qk;
int fault;
void wrong(const Weight &w, const void *scratch, int64_t m, void *y, int type, int64_t ldy, int part, int parts,
           Tuning tuning) {
    path_portable.run(w, scratch, m, y, type, ldy, part, parts, tuning);
    float *rows = static_cast<float *>(y);
    if (fault == 0 && w.bits == 3 && m > 2) static_cast<uint32_t *>(y)[ldy + 1] ^= 1;
    if (fault == 1 && w.table == NF4 && m == 7) rows[6 * ldy + 5] *= 1.001f;
    for (int64_t t = 0; t < m && w.table == FP8; ++t) {
        if (fault == 2) rows[t * ldy + 1] = 0;  // of subnormal codes
        if (fault == 3) rows[t * ldy + 2] = 0;  // of a NaN
        if (fault == 4) rows[t * ldy + 4] *= 1.001f;
    }
}
int main() {
    if (!agrees_with_portable(path_portable)) return 1;
    for (fault = 0; fault < 5; ++fault)
        if (agrees_with_portable({path_portable.prepare, wrong})) return 2 + fault;
    return 0;
}
"""
    )
    names = (SOURCES / f"{name}.cpp" for name in ("layout", "linear_portable", "selfcheck"))
    command = ["g++", "-std=c++17", "-O1", "-fopenmp", f"-I{SOURCES}", tmp_path / "main.cpp", *names]
    subprocess.run([*command, "-o", tmp_path / "check"], check=True)
    assert subprocess.run([tmp_path / "check"], check=False).returncode == 0


def test_a_missing_isa_is_an_error_that_lists_the_others(monkeypatch):
    stub = types.SimpleNamespace(
        qk_isa=lambda: -1, qk_isa_available=lambda i: i < 2, qk_cpu_flags=lambda: b"CPU"
    )
    monkeypatch.setattr(library, "load", lambda: stub)
    monkeypatch.setenv(library.ENVIRONMENT, "amx")
    with pytest.raises(
        RuntimeError, match=r"QUANTKIT_ISA='amx' cannot run on this CPU \(CPU\); it has: portable, avx2"
    ):
        library.isa()


def test_arena_places_and_outlives_itself():
    arena = library.Arena(200)
    a, b = arena.place(torch.arange(100, dtype=torch.uint8)), arena.place(torch.ones(72, dtype=torch.uint8))
    with pytest.raises(ValueError, match="do not fit"):
        arena.place(torch.ones(1, dtype=torch.uint8))
    assert a.data_ptr() % (2 << 20) == 0
    assert b.data_ptr() == a.data_ptr() + 128
    del arena
    gc.collect()
    assert torch.equal(a, torch.arange(100, dtype=torch.uint8))
    assert b.eq(1).all()


def test_op_passes_opcheck():
    w = layout.pack(packed_weight(4, 20, 64, 32, False)[0])
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (
        torch.ones(2, 64),
        w.units,
        torch.zeros(20),
        4,
        32,
        20,
        64,
        False,
        0,
        w.scale_factor,
        w.scale_type,
    )
    result = torch.library.opcheck(ops.cpu_linear, args, test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}


def test_threads_at_once_give_the_serial_results():
    w = layout.pack(packed_weight(4, 192, 512, 128, False)[0])
    inputs = [
        torch.randn(m, 512, generator=torch.Generator().manual_seed(m)) for m in (1, 2, 3, 5, 8, 13, 21, 34)
    ]
    serial = [run(w, x, ops.INT8_GROUP) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(run(w, inputs[i], ops.INT8_GROUP), serial[i]):
                wrong.append(i)

    race(work)
    assert not wrong
