"""The native column loops of GPTQ against single torch ops, bit for bit, on every path of this machine."""

import pytest
import torch
from column_blocks import arguments
from quantkit_kernels.cpu import columns, library

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")


def nearest(x, grid, e, g):
    scale, low, high = (each[e, g] for each in grid)
    return (x / scale).round().clamp(low, high)


def spread(weight, upper, *grid, groups):
    """`columns.spread` with no product and sum in one op, which some processors would fuse."""
    levels, errors, w = torch.zeros_like(weight), torch.zeros_like(weight), weight.clone()
    for e, used in enumerate(groups.tolist()):
        for j, g in enumerate(used):
            levels[e, j] = nearest(w[e, j], grid, e, g)
            errors[e, j] = (w[e, j] - levels[e, j] * grid[0][e, g]) / upper[e, j, j]
            w[e, j + 1 :] -= upper[e, j, j + 1 :, None] * errors[e, j]
    return levels, errors


def descend(value, gradient, hessian, *grid, groups):
    """`columns.descend` in the same way."""
    value, gradient = value.clone(), gradient.clone()
    for e, used in enumerate(groups.tolist()):
        for j, g in enumerate(used):
            wanted = value[e, j] + gradient[e, j] * (1 / hessian[e, j, j])
            new = nearest(wanted, grid, e, g) * grid[0][e, g]
            gradient[e, j + 1 :] -= hessian[e, j, j + 1 :, None] * (new - value[e, j])
            value[e, j] = new
    return value


SIZES = pytest.mark.parametrize(
    "sizes", [{}, {"e": 1, "b": 128, "n": 64}, {"b": 1, "n": 1}, {"n": 33, "g": 1}], ids=str
)


@pytest.mark.parametrize("bits", [2, 4, 8])
@SIZES
def test_spread(bits, sizes, path):
    whole, at, matrix, *grid, groups = arguments(bits, **sizes)
    upper, before = torch.linalg.cholesky(matrix).mT, whole.clone()
    wanted = spread(whole[:, at], upper, *grid, groups=groups)
    found = [torch.zeros_like(whole) for _ in range(2)]
    columns.spread(whole[:, at], upper, *grid, groups, *(each[:, at] for each in found))
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours[:, at], theirs)
        assert not ours[:, : at.start].any()
    assert torch.equal(whole, before)
    assert found[0].any()


@pytest.mark.parametrize("bits", [2, 4, 8])
@SIZES
def test_descend(bits, sizes, path):
    whole, at, hessian, *grid, groups = arguments(bits, **sizes)
    gradient = torch.randn(whole[:, at].mT.shape, generator=torch.Generator().manual_seed(1)).mT.contiguous()
    found, before = whole.clone(), gradient.clone()
    columns.descend(found[:, at], gradient, hessian, *grid, groups)
    assert torch.equal(found[:, at], descend(whole[:, at], gradient, hessian, *grid, groups=groups))
    assert torch.equal(found[:, : at.start], whole[:, : at.start])
    assert torch.equal(gradient, before)
    assert not torch.equal(found, whole)


def test_threads_share_the_rows():
    whole, at, matrix, *grid = arguments(e=4, b=64, n=300)
    upper, before, found = torch.linalg.cholesky(matrix).mT, torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = [torch.zeros_like(whole[:, at]) for _ in range(2)]
            columns.spread(whole[:, at].contiguous(), upper, *grid, *out)
            found.append(torch.cat(out))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_nan_stays_one(path):
    whole, at, matrix, *grid = arguments(e=1)
    whole[0, at.start, 5] = torch.nan
    levels, errors = torch.zeros_like(whole), torch.zeros_like(whole)
    upper = torch.linalg.cholesky(matrix).mT
    columns.spread(whole[:, at], upper, *grid, levels[:, at], errors[:, at])
    assert levels[0, at, 5].isnan().all()
    assert not levels[0, at, :5].isnan().any()


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, lambda t: t.double(), "weight must be fp32"),
        (0, lambda t: t.mT.contiguous().mT, "contiguous rows"),
        (0, lambda t: torch.zeros(1, 129, 8), "at most 128 columns"),
        (1, lambda t: t[:, :3], "the matrix must be"),
        (2, lambda t: t[:, :, :-1], "scale must be"),
        (3, lambda t: t[:1], "low must be"),
        (5, lambda t: t.long(), "groups must be"),
        (5, lambda t: t + 5, "groups must be 0 to 4"),
        (6, lambda t: t.mT.contiguous().mT, "levels must have the shape and strides"),
        (7, lambda t: t[:1], "errors must have the shape and strides"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(number, change, message):
    whole, _, *rest = arguments(room=0)
    given = [whole, *rest, torch.zeros_like(whole), torch.zeros_like(whole)]
    given[number] = change(given[number])
    with pytest.raises(ValueError, match=message):
        columns.spread(*given)
