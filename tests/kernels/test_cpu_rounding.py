"""Codes from weights and back in native code, on every path of this machine: the bits of the plain torch functions."""

import pytest
import torch
from cpu_paths import NATIVE
from quantkit_kernels.cpu import library, rounding

from quantkit.numerics.grid import to_codes
from quantkit.numerics.number import byte_values, decode, encode, rising_levels
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import NUMBERS, Grid

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")
SMALL_TABLES = ("fp4_e2m1", "nf4")


@pytest.fixture(params=NATIVE)
def path(request):
    """Every path of this machine in turn; there is nothing to emulate."""
    before = library.isa()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(before)


def every_bfloat():
    """All 65536 of them as fp32: subnormals, both zeros, infinities and NaNs too."""
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return codes.view(torch.bfloat16).float().view(256, 256)


def near_ties(number):
    """Every level, every middle of two, and the nearest fp32 on both sides of each; more of zero in the end."""
    levels, _, edges = rising_levels(number, torch.float32, torch.device("cpu"))
    x = torch.cat([levels, edges, torch.tensor([1e30, 1e-45])])
    x = torch.cat([x, x.nextafter(x + 1), x.nextafter(x - 1)])
    return torch.cat([x, -x]).view(1, -1)


def natively(x, scale, number, zero=None):
    if number.kind == "int":
        return rounding.encode_integers(x, scale, zero, 2**number.bits - 1)
    if number.name == "fp8_e4m3":
        return rounding.encode_fp8(x, scale)
    table = rising_levels(number, torch.float32, x.device)
    return rounding.encode_table(x, scale, table.edges, table.codes)


@pytest.mark.parametrize("scale", [1.0, 0.37, 3e-5, 2.0**-126, 1e30])
@pytest.mark.parametrize("name", ["fp8_e4m3", *SMALL_TABLES])
def test_every_bfloat_gets_the_code_that_torch_gives(name, scale, path):
    x, number = every_bfloat(), NUMBERS[name]
    assert torch.equal(natively(x, torch.full((256, 1), scale), number), encode(x / scale, number))


@pytest.mark.parametrize("name", ["fp8_e4m3", *SMALL_TABLES])
def test_ties_and_their_neighbours_are_rounded_as_torch_does(name, path):
    number = NUMBERS[name]
    x = near_ties(number)
    found = natively(x, torch.ones(1, 1), number)
    assert torch.equal(found, encode(x, number))
    negative_zero = {"fp8_e4m3": 128, "fp4_e2m1": 8}.get(name, 255)
    assert not (found == negative_zero).any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_rounded_as_torch_does(bits, path):
    number, qmax = NUMBERS[f"int{bits}"], 2**bits - 1
    x = torch.cat([every_bfloat()[:128].nan_to_num(0), (torch.arange(-(2**14), 2**14) / 16).view(128, 256)])
    zero = torch.arange(256.0).remainder(qmax + 1)[:, None]
    for scale in (1.0, 0.37):
        found = natively(x, torch.full((256, 1), scale), number, zero)
        assert torch.equal(found, encode(x / scale, number, zero))


@pytest.mark.parametrize("group", [1, 16, 48, 64, 192, 960])
@pytest.mark.parametrize("name", ["fp8_e4m3", *SMALL_TABLES, "int4"])
def test_every_group_has_its_own_scale(name, group, path):
    """Groups that fill the blocks of 64 weights, share them and straddle them; rows that end inside one."""
    number, generator = NUMBERS[name], torch.Generator().manual_seed(group)
    w = torch.randn(5, 960, generator=generator)
    scale = torch.rand(5, 960 // group, generator=generator) / 50 + 0.01
    zero = torch.randint(0, 16, scale.shape, generator=generator).float()
    wide = (each.repeat_interleave(group, 1) for each in (scale, zero))
    wide_scale, wide_zero = wide
    codes = encode(w / wide_scale, number, wide_zero if number.kind == "int" else None)
    assert torch.equal(natively(w, scale, number, zero), codes)
    if number.kind != "int":
        found = rounding.decode(codes, scale, byte_values(number))
        assert torch.equal(found, decode(codes, number) * wide_scale)


@pytest.mark.parametrize("name", ["fp8_e4m3", *SMALL_TABLES])
def test_every_code_is_decoded_as_torch_does(name, path):
    number = NUMBERS[name]
    codes = torch.arange(2**number.bits, dtype=torch.uint8)[None]
    found = rounding.decode(codes, torch.full((1, 1), 0.3), byte_values(number))
    wanted = decode(codes, number) * torch.tensor(0.3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() & (found == 0), wanted.signbit() & (wanted == 0))


@pytest.mark.parametrize("group", [16, 960])
@pytest.mark.parametrize("name", ["fp8_e4m3", *SMALL_TABLES])
def test_errors_of_rows_are_those_of_what_is_decoded(name, group, path):
    generator = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 15, (7, 960), generator=generator, dtype=torch.uint8)
    scale = torch.rand(7, 960 // group, generator=generator)
    original = torch.randn(7, 960, generator=generator)
    values = byte_values(NUMBERS[name])
    decoded, error, norm = rounding.compare(codes, scale, values, original)
    assert torch.equal(decoded, rounding.decode(codes, scale, values))
    exact = original.double()
    torch.testing.assert_close(error.double(), (decoded - exact).square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.double(), exact.square().sum(1), rtol=1e-5, atol=0)
    grid = Grid(NUMBERS[name], "group", group)
    whole = QuantizedWeight(codes, scale, None, grid)
    assert all(map(torch.equal, whole.compared(original), (decoded, error, norm)))


@pytest.mark.parametrize("name", ["fp8_e4m3", "int4"])
def test_a_weight_is_compared_the_same_without_the_library(name, monkeypatch):
    codes = torch.randint(0, 15, (6, 64), dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.rand(6, 4), None, Grid(NUMBERS[name], "group", 16))
    original = torch.randn(6, 64)
    found = weight.compared(original)
    monkeypatch.setattr(library, "available", lambda: False)
    torch.testing.assert_close(weight.compared(original), found)


def test_threads_share_the_rows():
    w, scale = torch.randn(333, 1024), torch.full((333, 8), 0.01)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            codes = rounding.encode_fp8(w, scale)
            found.append((codes, rounding.decode(codes, scale, byte_values(NUMBERS["fp8_e4m3"]))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "nf4", "int3"])
def test_a_grid_gives_the_same_codes_without_the_library(name, monkeypatch):
    grid = Grid(NUMBERS[name], "group", 16)
    w, scale = torch.randn(6, 64), torch.rand(6, 4) + 0.01
    zero = torch.full_like(scale, grid.midpoint)
    found = to_codes(w, scale, zero, grid)
    monkeypatch.setattr(library, "available", lambda: False)
    assert torch.equal(to_codes(w, scale, zero, grid), found)
    assert torch.equal(to_codes(w.double(), scale, zero, grid), found)


@pytest.mark.parametrize(
    ("call", "at", "value", "says"),
    [
        (
            "encode_fp8",
            0,
            torch.zeros(4, 64).half(),
            r"w must be contiguous torch.float32 \[4, 64\].*float16",
        ),
        ("encode_fp8", 0, torch.zeros(64), r"w is \[N, K\] and scale \[N, K/G\], got \[64\] and \[4, 2\]"),
        ("encode_fp8", 1, torch.ones(4, 3), "64 columns do not divide into 3 groups"),
        ("encode_fp8", 1, torch.ones(3, 2), r"scale must be contiguous torch.float32 \[4, 2\].*\[3, 2\]"),
        ("encode_integers", 2, torch.zeros(4, 1), r"zero must be .* \[4, 2\] .*, got torch.float32 \[4, 1\]"),
        ("encode_integers", 3, 256, "qmax must be 1 to 255, not 256"),
        ("encode_table", 2, torch.zeros(4), r"edges must be .* \[2\] .*, got torch.float32 \[4\]"),
        ("encode_table", 3, torch.zeros(33, dtype=torch.uint8), "a table has 1 to 32 levels, not 33"),
        ("decode", 0, torch.zeros(4, 64), r"codes must be contiguous torch.uint8 \[4, 64\].*float32"),
        ("compare", 3, torch.zeros(4, 32), r"original must be .* \[4, 64\]"),
        ("decode", 2, torch.zeros(16), r"values must be .* \[256\]"),
    ],
)
def test_wrong_arguments_are_named(call, at, value, says):
    w, scale = torch.zeros(4, 64), torch.ones(4, 2)
    more = {
        "encode_fp8": [],
        "encode_integers": [torch.zeros(4, 2), 15],
        "encode_table": [torch.tensor([-0.5, 0.5]), torch.zeros(3, dtype=torch.uint8)],
        "decode": [torch.zeros(256)],
        "compare": [torch.zeros(256), torch.zeros(4, 64)],
    }[call]
    given = [w.to(torch.uint8) if call in ("decode", "compare") else w, scale, *more]
    getattr(rounding, call)(*given)  # is right
    given[at] = value
    with pytest.raises(ValueError, match=says):
        getattr(rounding, call)(*given)
