"""The Triton kernels of GPTQ's column loops, interpreted on the CPU; run by `test_triton_interpreter.py`.

They are compared with the native loops, which have tests of their own.
"""

import pytest
import torch
import triton_mended
from column_blocks import arguments
from quantkit_kernels.cpu import columns as native
from quantkit_kernels.cpu import library
from quantkit_kernels.triton import columns_op

assert triton_mended
pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")
SIZES = pytest.mark.parametrize(("b", "n"), [(1, 1), (13, 40)])


@SIZES
def test_spread_is_that_of_the_cpu(b, n):
    whole, at, matrix, *grid = arguments(e=2, b=b, n=n, g=3)
    upper, before = torch.linalg.cholesky(matrix).mT, whole.clone()
    found, wanted = ([torch.zeros_like(whole) for _ in range(2)] for _ in range(2))
    columns_op.spread(whole[:, at], upper, *grid, *(each[:, at] for each in found))
    native.spread(whole[:, at], upper, *grid, *(each[:, at] for each in wanted))
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(whole, before)


@SIZES
def test_descend_is_that_of_the_cpu(b, n):
    whole, at, hessian, *grid = arguments(e=2, b=b, n=n, g=3)
    gradient = torch.randn(whole[:, at].shape, generator=torch.Generator().manual_seed(1))
    found, wanted, before = whole.clone(), whole.clone(), gradient.clone()
    columns_op.descend(found[:, at], gradient, hessian, *grid)
    native.descend(wanted[:, at], gradient, hessian, *grid)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(gradient, before)
    assert not torch.equal(found, whole)


def test_what_does_not_fit_is_refused():
    whole, _, matrix, *grid = arguments(room=0)
    out = torch.zeros_like(whole)
    with pytest.raises(ValueError, match="must have the strides of weight"):
        columns_op.spread(whole, matrix, *grid, out.mT.contiguous().mT, out)
    with pytest.raises(ValueError, match="must be contiguous"):
        columns_op.spread(whole, matrix, grid[0].mT.contiguous().mT, *grid[1:], out, out)
    with pytest.raises(ValueError, match="at most 256 columns"):
        columns_op.descend(torch.zeros(1, 257, 4), torch.zeros(1, 257, 4), matrix, *grid)
