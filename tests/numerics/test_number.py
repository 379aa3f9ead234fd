"""Number formats: what every code stands for, and which code a value gets."""

import math

import pytest
import torch
from quantkit_kernels import Spec, Stored, pack_bits
from quantkit_kernels.reference.wna16_linear import dequantize

from quantkit.numerics.number import bounds, decode, encode, largest, nearest
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import NUMBERS, Number, integer

TORCH_TYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
TABLES = [name for name, number in NUMBERS.items() if number.kind != "int"]
INTEGERS = [name for name, number in NUMBERS.items() if number.kind == "int"]


def every_code(number: Number) -> torch.Tensor:
    return torch.arange(2**number.bits, dtype=torch.uint8)


def rounded(x: torch.Tensor, number: Number, zero: torch.Tensor | None = None) -> torch.Tensor:
    zero = torch.tensor(float(number.zero)) if zero is None else zero
    return nearest(number)(x.clone(), *bounds(zero, number))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_code_comes_back(name, dtype):
    number = NUMBERS[name]
    codes = every_code(number)
    levels = decode(codes, number, dtype=dtype)
    kept = torch.isfinite(levels) & ~(torch.signbit(levels) & (levels == 0))
    assert torch.equal(encode(levels[kept], number), codes[kept])
    assert (~kept).sum() == {"fp8_e4m3": 3, "fp8_e5m2": 9, "fp4_e2m1": 1}.get(name, 0)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_with_zero_points_come_back(name):
    number = NUMBERS[name]
    codes = every_code(number)
    for zero in (0.0, 1.0, float(2**number.bits - 1)):
        levels = decode(codes, number, torch.tensor(zero))
        assert torch.equal(levels, codes.float() - zero)
        assert torch.equal(encode(levels, number, torch.tensor(zero)), codes)


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_fp8_codes_are_torchs(name):
    number = NUMBERS[name]
    codes = every_code(number)
    torch.testing.assert_close(
        decode(codes, number), codes.view(TORCH_TYPES[name]).float(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_fp8_rounds_as_torch_does(name):
    """At every level, every midpoint (a tie) and the nearest fp32 on both sides of each, inside the range."""
    number = NUMBERS[name]
    levels = decode(every_code(number), number)
    levels = levels[torch.isfinite(levels)].unique()
    points = torch.cat([levels, (levels[1:] + levels[:-1]) / 2])
    around = [torch.nextafter(points, torch.tensor(side)) for side in (-math.inf, math.inf)]
    x = torch.cat([points, *around]).clamp(-largest(number), largest(number))
    assert torch.equal(rounded(x, number), x.to(TORCH_TYPES[name]).float())


def test_e2m1_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(rounded(ties, NUMBERS["fp4_e2m1"]), even)
    assert torch.equal(rounded(-ties, NUMBERS["fp4_e2m1"]), -even)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_level_is_nearer(name, dtype):
    number = NUMBERS[name]
    levels = decode(every_code(number), number, dtype=dtype)
    levels = levels[torch.isfinite(levels)]
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x = torch.cat([x, x / 100, (levels[1:] + levels[:-1]) / 2]) * levels.abs().max() / 2
    least = (x[:, None].double() - levels.double()).abs().amin(1)
    assert torch.equal((rounded(x, number).double() - x.double()).abs(), least)
    assert torch.equal(decode(encode(x, number), number, dtype=dtype), rounded(x, number) + 0.0)


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_out_of_range_takes_the_end(name):
    number = NUMBERS[name]
    levels = decode(every_code(number), number)
    levels = levels[torch.isfinite(levels)]
    x = torch.tensor([-math.inf, -1e30, 1e30, math.inf])
    wanted = torch.stack([levels.min(), levels.min(), levels.max(), levels.max()])
    assert torch.equal(rounded(x, number), wanted)
    assert torch.equal(decode(encode(x, number), number), wanted)


@pytest.mark.parametrize("name", NUMBERS)
def test_zero_is_exact(name):
    number = NUMBERS[name]
    code = encode(torch.tensor([0.0, -0.0]), number)
    assert code.tolist() == [number.zero] * 2
    assert decode(code, number).tolist() == [0, 0]


def test_what_is_encoded_is_left_as_it_is():
    for number in NUMBERS.values():
        x = torch.tensor([0.3, -0.7])
        encode(x, number)
        assert x.tolist() == torch.tensor([0.3, -0.7]).tolist()


def test_a_new_format_is_an_entry():
    toy = Number("toy", 2, "table", 1, (-1.0, 0.0, 0.5, 2.0))
    x = torch.tensor([-9.0, -0.4, 0.25, 0.26, 1.2, 1.3])
    assert encode(x, toy).tolist() == [0, 1, 2, 2, 2, 3]
    assert decode(encode(x, toy), toy).tolist() == [-1, 0, 0.5, 0.5, 0.5, 2]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_kernels_reference_decodes_alike(bits, symmetric):
    """The kernels' package imports nothing of this one, so it has the integer formula a second time."""
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (8, 64), generator=g, dtype=torch.uint8)
    zero = None if symmetric else torch.randint(0, 2**bits, (8, 2), generator=g, dtype=torch.uint8)
    scale = torch.rand(8, 2, generator=g).bfloat16()
    zero_packed = None if symmetric else pack_bits(zero.T.contiguous(), bits).T.contiguous()
    stored = Stored(
        pack_bits(codes, bits), scale, zero_packed, Spec(f"int{bits}", bits, 32, symmetric, 8, 64)
    )
    theirs = dequantize(stored, torch.float32)
    assert torch.equal(theirs, QuantizedWeight(codes, scale, zero, integer(bits, 32, symmetric)).dequantize())


def test_fp8_by_casts_is_the_table():
    number = NUMBERS["fp8_e4m3"]
    levels = torch.tensor(sorted({v for v in number.values if math.isfinite(v)}))
    edges = (levels[1:] + levels[:-1]) / 2
    infinity = torch.full_like(edges, math.inf)
    x = torch.cat(
        [levels, edges, edges.nextafter(infinity), edges.nextafter(-infinity), torch.tensor([1e30, -1e30])]
    )
    by_table = encode(x.double(), number)
    assert torch.equal(encode(x, number), by_table)
    assert not (by_table == 128).any()
    assert torch.equal(nearest(number)(x, None, None, torch.empty_like(x)), decode(by_table, number))
    codes = torch.arange(256, dtype=torch.uint8)
    values = torch.tensor(number.values)
    assert torch.equal(decode(codes, number).nan_to_num(), values.nan_to_num())
