"""8-bit products and attention over a quantized KV cache on a GPU, against fp64 and the twins."""

import pytest
import torch
from quantkit_kernels.reference import kv_attention, scaled_linear
from quantkit_kernels.triton import kv_op, scaled_op

from quantkit.algorithms.rtn import rtn
from quantkit.layers.quant_linear import QuantLinear
from quantkit.scheme import NUMBERS, PRESETS, Grid, Scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
INT8, FP8 = "int8", "fp8_e4m3"
DTYPES = {INT8: torch.int8, FP8: torch.float8_e4m3fn}


def randoms(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def weight(number, n, k):
    values = randoms(n, k, seed=n + k)
    return (values * 40).round().clamp(-128, 127).to(torch.int8) if number == INT8 else values.to(DTYPES[FP8])


def relative(found, truth):
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def needs_fp8(number):
    if number == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with FP8 products")


@pytest.mark.parametrize("number", [INT8, FP8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "k", "group", "rows"), [(1000, 1024, 1024, 1), (200, 1000, 1000, 1), (576, 1024, 128, 128)]
)
def test_products_are_close_to_fp64_at_every_m(number, dtype, n, k, group, rows):
    needs_fp8(number)
    w = weight(number, n, k)
    scale, bias = randoms(-(-n // rows), k // group, seed=3).abs() / k, randoms(n, seed=4, dtype=dtype)
    for m in (1, 3, 4, 5, 16, 33, 64, 128, 1000):
        x = randoms(m, k, seed=m, dtype=dtype)
        x[:, 3] *= 1000  # an outlier channel
        given = (x, w, scale, None, None, None, bias, rows)
        y = scaled_op.triton_scaled_linear(*given)
        codes, sx = scaled_linear.quantize_inputs(x, number, group)
        truth = scaled_linear.scaled_linear(codes, sx, None, w, scale, bias, rows, torch.float64)
        assert relative(y, truth) < 2 * torch.finfo(dtype).eps, (m, relative(y, truth))
        assert torch.equal(scaled_op.triton_scaled_linear(*given), y)


@pytest.mark.parametrize("number", [INT8, FP8])
def test_codes_are_those_of_the_twin(number):
    needs_fp8(number)
    x = randoms(64, 4096, dtype=torch.bfloat16)
    x[5] = 0
    for group in (4096, 128):
        codes, scales = scaled_op._rounded(x, number, group, None, None, True)
        wanted, of = scaled_linear.quantize_inputs(x, number, group)
        assert torch.equal(scales, of)
        off = (codes.float() - wanted.float()).abs()
        assert float((off > 0).float().mean()) < 1e-3  # a division may round the other way at a half
        assert float(off.max()) <= (1 if number == INT8 else 32)


@pytest.mark.parametrize("zero", [None, -20])
def test_stored_scales_of_the_inputs(zero):
    x, w = randoms(70, 512, dtype=torch.bfloat16), weight(INT8, 300, 512)
    shift = None if zero is None else torch.tensor([zero], dtype=torch.int32, device="cuda")
    sums = None if zero is None else w.sum(1, dtype=torch.int32)
    scales = randoms(300, 1, seed=3).abs(), torch.tensor([0.02], device="cuda")
    given = scaled_op.Product(x, w, *scales, shift, sums, None, 1)
    assert relative(scaled_op.triton_scaled_linear(*given), scaled_op._twin(given)) < 0.01


@pytest.mark.parametrize("number", [INT8, FP8])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("b", "heads", "kv", "d", "places"), [(4, 32, 8, 128, 4096), (1, 8, 8, 64, 700), (2, 12, 2, 80, 1025)]
)
def test_cache_is_written_and_read(number, stored, dtype, b, heads, kv, d, places):
    k, v = (randoms(b, kv, places, d, seed=s, dtype=dtype) for s in (1, 2))
    codes = [
        torch.zeros(b, kv, places, d, dtype=torch.uint8, device="cuda").view(DTYPES[number]) for _ in "kv"
    ]
    shape = (1, kv, 1) if stored else (b, kv, places)
    scales = [torch.full(shape, 0.03, device="cuda") for _ in "kv"]
    begin = torch.zeros(b, dtype=torch.int32, device="cuda")
    kv_op.kv_write(k, v, *codes, *scales, begin, stored)
    for x, made, of in zip((k, v), codes, scales, strict=True):
        wanted, scale = kv_attention.quantize_entries(x, DTYPES[number], of if stored else None)
        assert torch.allclose(of.expand_as(scale), scale, rtol=1e-6)
        assert float((made.float() != wanted.float()).float().mean()) < 1e-3
    first = torch.arange(b, dtype=torch.int32, device="cuda") * 37
    end = places - torch.arange(b, dtype=torch.int32, device="cuda") * 101
    q = randoms(b, heads, d, dtype=dtype)
    given = (q, codes[0], scales[0], codes[1], scales[1], first, end, d**-0.5)
    for cap in (0.0, 30.0):
        truth = kv_attention.kv_decode(q.double(), *given[1:], cap)
        found = kv_op.kv_decode(*given, cap)
        assert relative(found, truth) < 4 * torch.finfo(dtype).eps, relative(found, truth)
        assert torch.equal(kv_op.kv_decode(*given, cap), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "compute"),
    [
        ("W8A8", "int8-range"),
        ("FP8_DYNAMIC", "fp8-range"),
        ("FP8_BLOCK", "fp8-group"),
        ("W4A8", "float"),
        ("FP8 alone", "float"),
    ],
)
def test_auto_takes_them_for_layers(monkeypatch, name, compute, dtype):
    """Here they pass the test that `auto` wants, and a layer computes what it says."""
    if compute.startswith("fp8"):
        needs_fp8(FP8)
    monkeypatch.delenv("QUANTKIT_BACKEND", raising=False)
    scheme = PRESETS.get(name) or Scheme(Grid(NUMBERS[FP8], "channel"))
    quantized = rtn(randoms(200, 256).cpu(), scheme.weights, torch.bfloat16)
    layer = QuantLinear.from_quantized(quantized, randoms(200, seed=2).cpu(), inputs=scheme.inputs).cuda()
    x = randoms(9, 256, seed=1, dtype=dtype)
    truth = layer(x.float())
    layer.prepare(None, dtype)
    assert (layer.backend, layer.compute) == ("triton", compute)
    assert relative(layer(x), truth) < (0.01 if compute == "float" else 4 * torch.finfo(dtype).eps)
