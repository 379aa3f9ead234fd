"""The Triton kernels of 8-bit products and of a quantized KV cache, interpreted on the CPU, against their twins; run by
`test_triton_interpreter.py`. Casts to FP8 are wrong in the interpreter, so the kernels encode by arithmetic there."""

import pytest
import tiny_models
import torch
import triton_mended
from quantkit_kernels.reference import kv_attention, scaled_linear
from quantkit_kernels.triton import kv_op, scaled_op, scaled_selfcheck
from quantkit_kernels.triton.scaled import quantize_kernel
from taped import decode
from wrong_arguments import refusals

from quantkit.layers.kv_cache import attach
from quantkit.runtime import GraphDecoder
from quantkit.scheme import KV_PRESETS

assert triton_mended
INT8, FP8 = "int8", "fp8_e4m3"
DTYPES = {INT8: torch.int8, FP8: torch.float8_e4m3fn}


def randoms(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(number, n, k):
    values = randoms(n, k, seed=n + k)
    return (values * 40).round().clamp(-128, 127).to(torch.int8) if number == INT8 else values.to(DTYPES[FP8])


def close(found, wanted):
    """Up to the rounding of fp32 sums: the codes are the same and their products exact."""
    assert not found.isnan().any()
    assert float((found.double() - wanted.double()).abs().max()) <= 1e-6 * float(wanted.abs().max()) + 1e-12


def codes_of(x, number, group):
    m, k = x.shape
    codes = torch.empty(m, k, dtype=torch.uint8).view(DTYPES[number])
    scales = torch.full((m, k // group), torch.nan)
    whole = group == k
    quantize_kernel[(m,)](
        x, codes, scales, scales, k, x.stride(0), k // group,
        FP8=number == FP8, CAST=False, GROUP=0 if whole else group, STATIC=False, HAS_ZERO=False,
        BK=64 if whole else group,
    )  # fmt: skip
    return codes, scales


@pytest.mark.parametrize("number", [INT8, FP8])
def test_inputs_become_the_codes_of_the_twin(number):
    x = randoms(6, 192) * torch.tensor([1e-30, 1e-3, 1.0, 50.0, 1e20, 0.0])[:, None]
    x[1, 7] = 300 * x[1].abs().max()
    for group in (192, 64):
        codes, scales = codes_of(x, number, group)
        wanted, of = scaled_linear.quantize_inputs(x, number, group)
        assert torch.equal(scales, of)
        assert torch.equal(codes.float(), wanted.float())


def test_every_fp8_code_and_every_middle_between_two():
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, torch.nextafter(middles, values[1:]), -values, -middles])
    row = torch.cat([torch.tensor([448.0]), x])[None]  # scale 1
    row = torch.nn.functional.pad(row, (0, -row.shape[1] % 64))
    codes, scales = codes_of(row, FP8, row.shape[1])
    assert scales.item() == 1.0
    assert torch.equal(codes.float(), row.to(torch.float8_e4m3fn).float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("number", [INT8, FP8])
def test_what_is_no_number_stays_so(number):
    x = randoms(3, 64)
    x[0, 5], x[1, 5] = torch.nan, torch.inf
    y = scaled_op.triton_scaled_linear(
        x, weight(number, 16, 64), torch.ones(16, 1), None, None, None, None, 1
    )
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()
    assert y[2].isfinite().all()


# M, N, K, columns per scale, rows per scale: rounded inside and before, ragged sizes, groups, blocks
CASES = [
    (3, 65, 256, 256, 1),
    (18, 70, 260, 260, 70),
    (2, 40, 256, 128, 32),
    (20, 130, 128, 64, 1),
    (6, 33, 100, 100, 1),
]


@pytest.mark.parametrize("number", [INT8, FP8])
@pytest.mark.parametrize(("m", "n", "k", "group", "rows"), CASES)
def test_products_are_those_of_the_twin(number, m, n, k, group, rows):
    x, w = randoms(m, k), weight(number, n, k)
    x[0] = 0
    scale, bias = randoms(-(-n // rows), k // group, seed=3).abs(), randoms(n, seed=4)
    given = scaled_op.Product(x, w, scale, None, None, None, bias, rows)
    close(scaled_op.triton_scaled_linear(*given), scaled_op._twin(given))


@pytest.mark.parametrize(("number", "zero"), [(INT8, None), (INT8, -20), (FP8, None)])
def test_stored_scales_of_the_inputs(number, zero):
    x, w = randoms(5, 96), weight(number, 40, 96)
    shift = None if zero is None else torch.tensor([zero], dtype=torch.int32)
    sums = None if zero is None else w.sum(1, dtype=torch.int32)
    scales = randoms(40, 1, seed=3).abs(), torch.tensor([0.02])
    given = scaled_op.Product(x, w, *scales, shift, sums, None, 1)
    close(scaled_op.triton_scaled_linear(*given), scaled_op._twin(given))


@pytest.mark.parametrize(
    "config", [scaled_op.Config(16, 64, 64, 3, 4, 1), scaled_op.Config(32, 128, 32, 2, 4, 1)]
)
def test_every_tiling_gives_the_same(config):
    x, w, scale = randoms(18, 256), weight(INT8, 70, 256), randoms(70, 1, seed=3).abs()
    given = scaled_op.Product(x, w, scale, None, None, None, None, 1)
    y = scaled_op.launch(given, config, torch.full((18, 70), torch.nan))
    close(y, scaled_op._twin(given))
    assert torch.equal(scaled_op.launch(given, config), y)  # the tickets are back at 0


@pytest.mark.parametrize("inputs", scaled_selfcheck.NUMBERS)
def test_the_kernels_pass_the_test_that_auto_wants(inputs, monkeypatch):
    monkeypatch.setattr(scaled_selfcheck, "N", 40)
    monkeypatch.setattr(scaled_selfcheck, "K", 256 if inputs == "fp8-group" else 160)
    monkeypatch.setattr(scaled_selfcheck, "REPEATS", 1)
    assert scaled_selfcheck.compare(torch.device("cpu"), inputs, False, torch.bfloat16) is None


def right_product():
    w = weight(INT8, 20, 64)
    sums = w.sum(1, dtype=torch.int32)
    zero = torch.tensor([3], dtype=torch.int32)
    return [randoms(3, 64), w, torch.ones(20, 1), torch.tensor([0.1]), zero, sums, randoms(20), 1]


def test_wrong_arguments_are_refused_and_never_crash():
    assert refusals(scaled_op.triton_scaled_linear, right_product, 100, "triton_scaled_linear") > 50


# the cache ------------------------------------------------------------------------------------------------------------


def cache(number, b, heads, places, d, stored):
    codes = [torch.zeros(b, heads, places, d, dtype=torch.uint8).view(DTYPES[number]) for _ in "kv"]
    scales = [torch.full((1, heads, 1), 0.03) if stored else torch.zeros(b, heads, places) for _ in "kv"]
    return [*codes, *scales]


@pytest.mark.parametrize("number", [INT8, FP8])
@pytest.mark.parametrize("stored", [False, True])
def test_entries_are_written_as_the_twin_writes_them(number, stored):
    b, heads, places, d = 2, 2, 12, 80
    k, v = (randoms(b, 5, heads, d, seed=s).transpose(1, 2) for s in (1, 2))
    k[0, 0, 1], v[1, 1, 2, 3] = 0, 1000.0
    begin = torch.tensor([0, 7], dtype=torch.int32)
    ours, twins = cache(number, b, heads, places, d, stored), cache(number, b, heads, places, d, stored)
    kv_op.kv_write(k, v, *ours, begin, stored)
    kv_op._twin_write(kv_op.Written(k, v, *twins, begin, stored))
    for found, wanted in zip(ours, twins, strict=True):
        assert torch.equal(found.float(), wanted.float())


def test_halves_go_away_from_zero():
    x = torch.tensor([[[[127.0, 0.5, -0.5, 1.5, -2.5, 126.5, 0.49, 0.0]]]])
    codes, scale = kv_attention.quantize_entries(x, torch.int8, None)
    assert scale.item() == 1.0
    assert codes.flatten().tolist() == [127, 1, -1, 2, -3, 127, 0, 0]


# B, heads, kv heads, head dim, places, programs per head, softcap
DECODES = [(2, 4, 2, 64, 150, 1, 0.0), (2, 8, 2, 32, 300, 3, 0.0), (1, 6, 2, 80, 100, 2, 30.0)]


@pytest.mark.parametrize("number", [INT8, FP8])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("b", "heads", "kv", "d", "places", "splits", "cap"), DECODES)
def test_attention_is_that_of_the_twin(number, stored, b, heads, kv, d, places, splits, cap):
    k_codes, v_codes, k_scales, v_scales = held = cache(number, b, kv, places, d, stored)
    begin = torch.zeros(b, dtype=torch.int32)
    k, v = (randoms(b, kv, places, d, seed=s) for s in (1, 2))
    kv_op._twin_write(kv_op.Written(k, v, *held, begin, stored))
    first = torch.tensor([3, 20][:b], dtype=torch.int32)
    end = torch.tensor([places - 9, 21][:b], dtype=torch.int32)  # the second sees one place
    q = randoms(b, heads, d)
    given = kv_op.Read(q, k_codes, k_scales, v_codes, v_scales, first, end, d**-0.5, cap)
    found = kv_op.decode(given, kv_op.Config(32, splits, 4, 1))
    close(found, kv_attention.kv_decode(*given))
    assert torch.equal(kv_op.decode(given, kv_op.Config(32, splits, 4, 1)), found)


def test_a_step_of_a_model_writes_and_reads_the_cache():
    """A prompt and steps over the buffers that a captured step has, with a sliding window of 8."""
    model, ids = tiny_models.FAMILIES["gemma2"](), tiny_models.ids(6)
    attach(model, KV_PRESETS["INT8"])
    tokens, logits = decode(model, ids, 5)
    found_tokens, found = decode(GraphDecoder(model, 5), ids, 5)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)
    assert found_tokens == tokens
