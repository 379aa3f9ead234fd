"""Inputs in FP8 as checkpoints mean them: the native kernels multiply what `round_inputs` gives, bit for bit."""

from dataclasses import replace

import pytest
import torch
from cpu_paths import DTYPES, assert_close
from packed_weights import packed_weight
from quantkit_kernels import InputRange, Spec, Stored, backend, pack_bits
from quantkit_kernels.cpu import library
from quantkit_kernels.reference.wna16_linear import dequantize

from quantkit.numerics.inputs import InputScale, round_inputs
from quantkit.scheme import FP8_TOKEN, NUMBERS, Grid

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

FP8 = NUMBERS["fp8_e4m3"]
SCALE = 0.0173
GRIDS = {
    "token": ("fp8-range", FP8_TOKEN),
    "tensor": ("fp8-range", Grid(FP8, "tensor")),
    "block": ("fp8-group", Grid(FP8, "group", 128, dynamic=True)),
}
ONE = 0x38  # in FP8


def fp8_weight(codes, scale):
    n, k = codes.shape
    spec = Spec("fp8_e4m3", 8, k // scale.shape[1], True, n, k)
    return Stored(pack_bits(codes, 8), scale, None, spec)


def prepared(weight, kind, dtype):
    compute, grid = GRIDS[kind]
    inputs = None if grid.dynamic else InputRange(SCALE)
    cpu = backend("cpu")
    ready = cpu.prepare(replace(weight, spec=weight.spec.with_inputs(compute), inputs=inputs), dtype)
    assert cpu.restore(ready).inputs == inputs
    return ready


def twin(x, kind):
    """As `numerics` rounds, in the type of x."""
    grid = GRIDS[kind][1]
    return round_inputs(x, grid, None if grid.dynamic else InputScale(torch.tensor([SCALE])))


def awkward(k, dtype):
    """Rows of many sizes, zeros, subnormals, values of one row eight powers of ten apart, ties."""
    g = torch.Generator().manual_seed(k)
    x = torch.randn(24, k, generator=g) * 10.0 ** torch.randint(-4, 4, (24, k), generator=g).float()
    x[0], x[1], x[2, : k // 2] = 0, 1e-44, 0
    x[3] = torch.arange(k) / 16  # halfway between FP8 numbers, if the scale is a power of two
    x[3, 0] = 448
    x[4] = -x[3] * 2**-9
    return x.to(dtype)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_the_identity_shows_the_rounded_inputs(path, kind, dtype):
    k = 256
    codes = torch.zeros(k, k, dtype=torch.uint8).fill_diagonal_(ONE)
    ready = prepared(fp8_weight(codes, torch.ones(k, k // 128)), kind, dtype)
    x = awkward(k, dtype)
    for rows in (x[:1], x[3:5], x):
        y = backend("cpu").bind(ready, dtype)(rows, None)
        assert torch.equal(y, twin(rows, kind))
        assert torch.equal(backend("cpu").linear(ready, rows, None), y)


@pytest.mark.parametrize("kind", GRIDS)
def test_a_nan_and_an_infinity_do_what_they_do_in_torch(path, kind):
    codes = torch.full((16, 256), ONE, dtype=torch.uint8)
    ready = prepared(fp8_weight(codes, torch.ones(16, 1)), kind, torch.float32)
    x = torch.ones(4, 256)
    x[1, 3], x[2, 200] = torch.nan, torch.inf
    y = backend("cpu").bind(ready, torch.float32)(x, None)
    wanted = twin(x, kind).sum(1)
    assert torch.equal(y.isfinite().all(1), wanted.isfinite())
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("kind", ["token", "tensor"])
@pytest.mark.parametrize(("n", "k"), [(37, 203), (3, 1), (18, 384)])
def test_ragged_rows_and_biases(path, kind, n, k):
    g = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 0x70, (n, k), dtype=torch.uint8, generator=g)
    weight = fp8_weight(codes, torch.rand(n, 1, generator=g) + 0.1)
    w, bias, ready = dequantize(weight, torch.float64), torch.randn(n), prepared(weight, kind, torch.float32)
    for m in (1, 5, 9, 17):
        x = torch.randn(m, k, generator=g)
        y = backend("cpu").bind(ready, torch.float32)(x, bias)
        assert_close(f"{path} m={m}", y, twin(x, kind).double() @ w.T + bias.double(), 1e-6)


def test_integer_weights_take_them_too(path):
    weight, w = packed_weight(8, 33, 256, 128, symmetric=True)
    ready, x = prepared(weight, "token", torch.float32), torch.randn(5, 256)
    y = backend("cpu").bind(ready, torch.float32)(x, None)
    assert_close(path, y, twin(x, "token").double() @ w.T, 1e-6)
