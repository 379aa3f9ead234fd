"""The native CPU kernels against fp64, and every instruction set path against every other."""

import threading

import pytest
import torch
from quantkit_kernels import pack_bits
from quantkit_kernels.cpu import library, ops

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

PATHS = [
    name for i, name in enumerate(library.ISAS) if library.available() and library.load().qk_isa_available(i)
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _restore_path():
    before = library.isa()
    yield
    library.set_isa(before)


def packed_weight(bits, n, k, group, symmetric, scale_dtype=torch.float16, seed=0):
    """(packed, scale, zero_packed, W in fp64), random, with negative scales and an all-zero group."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g)
    codes[0] = 2**bits - 1
    codes[1] = 0
    scale = (torch.randn(n, k // group, generator=g) * 0.05).to(scale_dtype)
    scale[0, 0] = 0
    zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zero = torch.randint(0, 2**bits, zero.shape, dtype=torch.uint8, generator=g)
    w = (codes.double().view(n, -1, group) - zero.double()[:, :, None]) * scale.double()[:, :, None]
    zero_packed = None if symmetric else pack_bits(zero.T.contiguous(), bits).T.contiguous()
    return pack_bits(codes, bits), scale, zero_packed, w.view(n, k)


def run(weight, x, compute=ops.FLOAT, bias=None):
    """The op; the output's memory was NaN before (the allocator hands it out again)."""
    poison = torch.full((x.shape[0], weight.n), float("nan"), dtype=x.dtype)
    y = torch.empty_like(poison)
    ops.run(x, weight.weight(bias=bias), x.shape[0], compute, poison)
    y = ops.cpu_linear(
        x,
        weight.units,
        bias,
        weight.bits,
        weight.group_size,
        weight.n,
        weight.k,
        weight.symmetric,
        compute,
        weight.scale_factor,
        weight.wide_scales,
    )
    assert torch.equal(y, poison)
    return y


def assert_close(name, found, truth, limit):
    """RMS error relative to the RMS of the fp64 truth, and the largest error."""
    rms = truth.square().mean().sqrt()
    error = (found.double() - truth).square().mean().sqrt() / rms
    worst = (found.double() - truth).abs().max() / rms
    assert error <= limit, f"{name}: relative RMS error {error:.3g}"
    assert worst <= 8 * limit, f"{name}: relative largest error {worst:.3g}"


def int8_twin(x, w_codes, scale, zero, group, per_token):
    """The formula of compute int8 in fp64: x quantized per token and chunk of min(group, 128) columns."""
    m, k = x.shape
    x = x.float()
    chunk = group if group in (32, 64) and group != k else 128
    blocks = torch.nn.functional.pad(x, (0, -k % chunk)).view(m, -1, chunk)
    most = blocks.abs().amax(-1, keepdim=True)
    if per_token:
        most = most.amax(1, keepdim=True).expand_as(most)
    q = (blocks * torch.where(most > 0, 127 / most, 0)).round().double()
    return (q * (most / 127).double()).view(m, -1)[:, :k]


SHAPES = [(16, 128), (17, 384), (50, 640)]
GROUPS = (32, 64, 128, 0)  # 0: per channel


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_float_is_close_to_fp64(path, bits, group, symmetric):
    library.set_isa(path)
    for (n, k), m, dtype in zip(SHAPES * 2, (1, 2, 3, 8, 16, 33), DTYPES * 2, strict=True):
        packed, scale, zero, w = packed_weight(bits, n, k, group or k, symmetric)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(n)) if m % 2 else None
        y = run(ops.pack(packed, scale, zero, bits, n, k), x, bias=bias)
        limit = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
        truth = x.double() @ w.T + (0 if bias is None else bias.double())
        assert_close(f"{path} {bits} bits g{group} [{n}, {k}] m={m} {dtype}", y, truth, limit)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("compute", [ops.INT8_GROUP, ops.INT8_TOKEN])
def test_int8_is_its_formula(path, bits, group, compute):
    library.set_isa(path)
    for (n, k), m, dtype in zip(SHAPES * 2, (1, 2, 3, 8, 16, 33), DTYPES * 2, strict=True):
        packed, scale, zero, w = packed_weight(bits, n, k, group or k, False)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        x[0, : k // 2] = 0
        y = run(ops.pack(packed, scale, zero, bits, n, k), x, compute)
        rounded = int8_twin(x, None, None, None, group or k, compute == ops.INT8_TOKEN)
        limit = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}[dtype]
        assert_close(f"{path} {bits} bits g{group} [{n}, {k}] m={m} {dtype}", y, rounded @ w.T, limit)


@pytest.mark.parametrize("bits", ops.BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_layout_converts_back_exactly(bits, group, scale_dtype):
    for n, k in (*SHAPES, (5, 256)):
        for symmetric in (True, False):
            tensors = packed_weight(bits, n, k, group or k, symmetric, scale_dtype)[:3]
            weight = ops.pack(*tensors, bits, n, k)
            assert weight.wide_scales == (scale_dtype == torch.float32)
            for before, after in zip(tensors, ops.unpack(weight), strict=True):
                assert (before is None) == (after is None)
                assert before is None or (before.dtype == after.dtype and torch.equal(before, after))


def test_op_passes_opcheck():
    packed, scale, zero, _ = packed_weight(4, 20, 64, 32, False)
    w = ops.pack(packed, scale, zero, 4, 20, 64)
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
        w.wide_scales,
    )
    result = torch.library.opcheck(ops.cpu_linear, args, test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}


def test_threads_at_once_give_the_serial_results():
    packed, scale, zero, _ = packed_weight(4, 192, 512, 128, False)
    w = ops.pack(packed, scale, zero, 4, 192, 512)
    inputs = [
        torch.randn(m, 512, generator=torch.Generator().manual_seed(m)) for m in (1, 2, 3, 5, 8, 13, 21, 34)
    ]
    serial = [run(w, x, ops.INT8_GROUP) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(run(w, inputs[i], ops.INT8_GROUP), serial[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
