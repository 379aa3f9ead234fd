"""Weights stored by table, NF4, FP8 E4M3 and FP4 E2M1, on every path of the native CPU kernels against fp64."""

import pytest
import torch
from cpu_paths import DTYPES, assert_close
from packed_weights import same
from quantkit_kernels import Spec, Stored, pack_bits
from quantkit_kernels.cpu import layout, library, ops

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

TABLES = ("nf4", "fp8_e4m3", "fp4_e2m1")  # by their number less 1
# [N, K] and group: ragged rows; per channel ragged columns too.
SHAPES = [(37, 192, 32), (37, 192, 64), (37, 384, 128), (18, 512, 256), (37, 203, 203)]
SMALL = [(37, 208, 16), (18, 224, 32)]  # of FP4: a ragged number of groups
NAN = 0x7F


def shapes_of(table):
    return SHAPES + SMALL * (table == "fp4_e2m1")


def nf4_values():
    """fp64 [16], from the definition: quantiles of the normal distribution, one side and then the other."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1)
    most = 1 - 0.5 * (1 / 32 + 1 / 30)
    positive = normal.icdf(torch.linspace(most, 0.5, 9, dtype=torch.float64))[:-1]
    negative = -normal.icdf(torch.linspace(most, 0.5, 8, dtype=torch.float64))[:-1]
    return torch.cat([negative, torch.zeros(1), positive.flip(0)]) / positive.max()


def values_of(table):
    """fp64 [16] or [256]: what each code stands for."""
    if table == "nf4":
        return nf4_values()
    if table == "fp4_e2m1":
        positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        return torch.cat([positive, -positive])
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def table_weight(table, n, k, group, scale_dtype=torch.float16):
    """(codes uint8 [N, K], scale [N, K/G], W [N, K] in fp64); in row 1 only small codes, of FP8 all subnormal."""
    g = torch.Generator().manual_seed(n + k + group)
    codes = torch.randint(0, 256 if table == "fp8_e4m3" else 16, (n, k), dtype=torch.uint8, generator=g)
    codes[(codes & 127) == NAN] = 0
    codes[1] &= 0x87
    scale = (torch.randn(n, k // group, generator=g) * 0.05).to(scale_dtype)
    scale[0, 0] = 0
    return codes, scale, values_of(table)[codes.long()] * scale.double().repeat_interleave(group, 1)


def run(weight, x, bias=None):
    """What the bare call leaves in memory that held NaN, and every other way of calling gives as well."""
    spec = weight.spec
    y = torch.full((x.shape[0], spec.n), float("nan"), dtype=x.dtype)
    ops.run(x, weight, ops.FLOAT, y, bias)
    facts = (spec.bits, spec.group_size, spec.n, spec.k, True, ops.FLOAT)
    scales = (weight.scale_factor, weight.scale_type, 1 + TABLES.index(spec.number))
    by_op = ops.cpu_linear(x, weight.units, bias, *facts, *scales)
    for found in (by_op, ops.linear(weight, x, bias), ops.bind(weight, x.dtype)(x, bias)):
        torch.testing.assert_close(found, y, rtol=0, atol=0, equal_nan=True)
    return y


@pytest.mark.parametrize(
    ("table", "n", "k", "group"), [(t, *shape) for t in TABLES for shape in shapes_of(t)]
)
def test_close_to_fp64_for_any_number_of_tokens(path, table, n, k, group):
    codes, scale, w = table_weight(table, n, k, group)
    weight = layout.pack_codes(codes, scale, table)
    g = torch.Generator().manual_seed(k)
    tokens = torch.randn(33, k, generator=g)
    for m in range(1, 34):
        for dtype in DTYPES if m in (1, 2, 8, 16, 33) else DTYPES[m % 3 :][:1]:
            x = tokens[:m].to(dtype)
            bias = torch.randn(n, generator=g) if m % 2 else None
            y = run(weight, x, bias)
            limit = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
            truth = x.double() @ w.T + (0 if bias is None else bias.double())
            assert_close(f"{path} {table} g{group} m={m} {dtype}", y, truth, limit)


@pytest.mark.parametrize("table", TABLES)
def test_agrees_with_the_portable_path_within_fp32_rounding(path, table):
    for n, k, group in shapes_of(table):
        weight = layout.pack_codes(*table_weight(table, n, k, group, torch.float32)[:2], table)
        assert weight.scale_type == layout.F32
        x = torch.randn(23, k, generator=torch.Generator().manual_seed(k))
        found = {m: run(weight, x[:m]) for m in (1, 3, 4, 6, 8, 23)}
        library.set_isa("portable")
        for m, y in found.items():
            expected = run(weight, x[:m])
            worst = (y - expected).abs() / expected.square().mean(0).sqrt().clamp(min=1e-3)
            assert worst.max() < (1e-5 if m > 1 else 1e-4), f"{table} g{group} m={m}"
        library.set_isa(path.removeprefix("emulated-"))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("m", [1, 2, 7, 32])
def test_every_code_is_its_value_exactly(path, table, m):
    """Tokens of one 1 each read the weight back; subnormals taken for zero, as a caller may ask, do no harm.

    Every second scale is subnormal in fp16, as it is kept.
    """
    values = values_of(table)
    codes = torch.arange(len(values), dtype=torch.uint8)
    codes[(codes & 127) == NAN] = 0
    codes = codes.repeat(512 // len(codes)).view(16, 32)
    scale = torch.tensor([1.0, 2.0**-20] * 8)[:, None]
    weight = layout.pack_codes(codes, scale, table)
    flushing = torch.set_flush_denormal(True)
    try:
        back = torch.cat([run(weight, x.contiguous()) for x in torch.eye(32).split(m)]).T
    finally:
        assert not flushing or torch.set_flush_denormal(False)
    # The published NF4 values were computed in fp32.
    torch.testing.assert_close(
        back.double() / scale, values[codes.long()], rtol=0, atol=3e-7 if table == "nf4" else 0
    )
    library.set_isa("portable")
    assert torch.equal(back, run(weight, torch.eye(32)).T)
    library.set_isa(path.removeprefix("emulated-"))


@pytest.mark.parametrize("code", [NAN, NAN | 128])
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_a_nan_code_reaches_its_own_row_only(path, code, n, k, group):
    codes, scale, _ = table_weight("fp8_e4m3", n, k, group)
    for column in (0, 33, k - 1):
        bad = codes.clone()
        bad[3, column] = code
        for m in (1, 9):
            y = run(layout.pack_codes(bad, scale, "fp8_e4m3"), torch.ones(m, k))
            assert y[:, 3].isnan().all()
            assert y[:, torch.arange(n) != 3].isfinite().all()


@pytest.mark.parametrize("table", TABLES)
def test_a_nan_or_an_infinity_reaches_its_own_token_only(path, table):
    weight = layout.pack_codes(*table_weight(table, 32, 256, 128)[:2], table)
    for m in (3, 20):
        for bad in (float("nan"), float("inf")):
            x = torch.ones(m, 256)
            x[1, 130] = bad
            finite = run(weight, x).isfinite()
            assert finite[[0, 2]].all()
            assert not finite[1].all()
            assert bad == float("inf") or not finite[1].any()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_layout_converts_back_exactly(table, scale_dtype):
    for n, k, group in shapes_of(table):
        codes, scale, _ = table_weight(table, n, k, group, scale_dtype)
        codes[2, 5] |= NAN if table == "fp8_e4m3" else 0
        bits = 8 if table == "fp8_e4m3" else 4
        stored = Stored(pack_bits(codes, bits), scale, None, Spec(table, bits, group, True, n, k))
        assert same(layout.unpack(layout.pack_codes(codes, scale, table)), stored)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("compute", [ops.INT8_GROUP, ops.INT8_TOKEN])
def test_int8_activations_are_refused(path, table, compute):
    weight = layout.pack_codes(*table_weight(table, 16, 64, 32)[:2], table)
    x = torch.ones(2, 64)
    says = rf"weights stored by table \({table}\) have no compute int8; use compute float"
    with pytest.raises(ValueError, match=says):
        ops.linear(weight, x, compute=compute)
    with pytest.raises(ValueError, match=says):
        ops.run(x, weight, compute, torch.empty(2, 16))
    facts = (weight.spec.bits, 32, 16, 64, True, compute, weight.scale_factor, weight.scale_type)
    with pytest.raises(ValueError, match=says):
        ops.cpu_linear(x.to("meta"), weight.units.to("meta"), None, *facts, 1 + TABLES.index(table))


def test_what_is_no_table_weight_is_refused():
    codes, scale = torch.zeros(16, 64, dtype=torch.uint8), torch.ones(16, 2)
    with pytest.raises(ValueError, match="unknown table 'fp4'; known: nf4, fp8_e4m3, fp4_e2m1"):
        layout.pack_codes(codes, scale, "fp4")
    with pytest.raises(ValueError, match="code 16 does not fit in 4 bits"):
        layout.pack_codes(codes + 16, scale, "nf4")
    with pytest.raises(ValueError, match="64 columns do not divide into 3 groups"):
        layout.pack_codes(codes, torch.ones(16, 3), "nf4")
    with pytest.raises(ValueError, match=r"codes are \[N, K\] and scale \[N, K/G\]"):
        layout.pack_codes(codes, torch.ones(15, 2), "nf4")
    with pytest.raises(ValueError, match="not 16"):
        layout.pack_codes(codes, torch.ones(16, 4), "nf4")
    with pytest.raises(TypeError, match="codes must be uint8"):
        layout.pack_codes(codes.int(), scale, "nf4")
    with pytest.raises(ValueError, match="no number 'nf4' of 8 bits"):
        Spec("nf4", 8, 32, True, 16, 64)
    with pytest.raises(ValueError, match="codes of fp8_e4m3 have no zero points"):
        Spec("fp8_e4m3", 8, 32, False, 16, 64)


@pytest.mark.parametrize("table", TABLES)
def test_op_passes_opcheck(table):
    w = layout.pack_codes(*table_weight(table, 20, 64, 32)[:2], table)
    facts = (w.spec.bits, 32, 20, 64, True, ops.FLOAT, w.scale_factor, w.scale_type, 1 + TABLES.index(table))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (torch.ones(2, 64), w.units, torch.zeros(20), *facts)
    result = torch.library.opcheck(ops.cpu_linear, args, test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}
