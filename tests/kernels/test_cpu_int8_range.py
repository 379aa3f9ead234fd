"""Inputs in int8 as checkpoints mean them: the native kernels against fp64 products of what `round_inputs` gives."""

from dataclasses import replace

import pytest
import torch
from cpu_paths import DTYPES, assert_close
from packed_weights import packed_weight
from quantkit_kernels import InputRange, backend
from quantkit_kernels.cpu import library

from quantkit.numerics.inputs import InputScale, round_inputs
from quantkit.scheme import INT8_TOKEN, NUMBERS, Grid

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

STATIC = Grid(NUMBERS["int8"], "tensor")
RANGES = {"token": None, "tensor": InputRange(0.021875), "tensor asym": InputRange(0.015625, -37)}
KINDS = [(8, 0), (4, 128), (4, 32), (3, 64)]  # bits, group; 0: one scale per row


def twin(x, inputs):
    """The inputs on their grid, fp64."""
    if inputs is None:
        return round_inputs(x, INT8_TOKEN).double()
    zero = torch.tensor([inputs.zero], dtype=torch.int8)
    static = InputScale(torch.tensor([inputs.scale]), zero if inputs.zero else None)
    return round_inputs(x, STATIC, static).double()


def run(weight, inputs, x, bias):
    """As the backend binds it, and by its op."""
    cpu = backend("cpu")
    ready = cpu.prepare(replace(weight, spec=weight.spec.with_inputs("int8-range"), inputs=inputs), x.dtype)
    assert cpu.restore(ready).inputs == inputs
    y = cpu.bind(ready, x.dtype)(x, bias)
    torch.testing.assert_close(cpu.linear(ready, x, bias), y, rtol=0, atol=0, equal_nan=True)
    return y


@pytest.mark.parametrize("inputs", RANGES.values(), ids=list(RANGES))
@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_products_are_those_of_rounded_inputs(path, bits, group, inputs):
    for (n, k), m, dtype in zip(((17, 384), (50, 640), (16, 128)), (1, 3, 33), DTYPES, strict=True):
        weight, w = packed_weight(bits, n, k, group or k, symmetric=True)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        x[0, : k // 2] = 0
        bias = torch.randn(n, generator=torch.Generator().manual_seed(n)) if m % 2 else None
        truth = twin(x.float(), inputs) @ w.T + (0 if bias is None else bias.double())
        limit = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype]
        assert_close(f"{path} W{bits} g{group} m={m} {dtype}", run(weight, inputs, x, bias), truth, limit)


@pytest.mark.parametrize("inputs", RANGES.values(), ids=list(RANGES))
def test_columns_beyond_a_ragged_row_add_nothing(path, inputs):
    for n, k in ((3, 1), (17, 101), (16, 130), (33, 31)):
        weight, w = packed_weight(8, n, k, k, symmetric=True)
        x = torch.randn(9, k, generator=torch.Generator().manual_seed(k))
        assert_close(f"[{n}, {k}]", run(weight, inputs, x, None), twin(x, inputs) @ w.T, 2e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_lowest_code_of_every_input_does_not_overflow(path, bits):
    """-128 everywhere, and the largest codes: 8 products of 15 and -128 are 94 % of what 16 bits hold."""
    weight, w = packed_weight(bits, 16, 256, 256, symmetric=True)
    for m in (1, 2, 4, 16):
        x = torch.full((m, 256), -1.0)
        inputs = InputRange(2**-7)
        assert_close(f"{path} m={m}", run(weight, inputs, x, None), x.double() @ w.T, 1e-6)


def test_rows_without_a_scale_are_zeros_or_nan(path):
    """Zeros and values too small for a scale give 0; NaN and infinity reach the output, but for a stored range, which
    cuts infinity off.
    """
    weight, _ = packed_weight(8, 16, 128, 128, symmetric=True)
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = 0, 1e-44
    x[2, 5], x[3, 5] = torch.nan, torch.inf
    y = run(weight, None, x, None)
    assert not y[:2].any()
    assert y[2:4].isnan().all()
    assert y[4:].isfinite().all()
    y = run(weight, InputRange(0.02), x, None)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("inputs", [(0.0, 3), (-1.0, 0), (float("nan"), 0), (float("inf"), 0), (1.0, 200)])
def test_a_range_that_is_none_is_refused(inputs):
    weight, _ = packed_weight(8, 16, 128, 128, symmetric=True)
    with pytest.raises(ValueError, match="a range of inputs has a positive scale"):
        replace(weight, inputs=InputRange(*inputs))
