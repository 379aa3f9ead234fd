"""The native errors of the range search against fp64, on every path of this machine."""

import pytest
import torch
from quantkit_kernels.cpu import library
from quantkit_kernels.cpu.range_errors import range_errors

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")


def arguments(groups=24, group=112, candidates=5, bits=4):
    """Ranges that shrink from all of a normal weight to a third, zero points beside the middle."""
    g = torch.Generator().manual_seed(bits)
    w = torch.randn(groups, group, generator=g) * torch.logspace(-3, 1, groups)[:, None]
    shrink = torch.linspace(1, 0.3, candidates)[:, None]
    scale = w.abs().amax(1) * 2 * shrink / (2**bits - 1)
    zero = torch.randint(0, 2**bits, (candidates, groups), generator=g).float()
    return w, scale, zero, 2**bits - 1


def exact(w, scale, zero, qmax, column=None):
    w, scale, zero = w.double(), scale.double()[:, :, None], zero.double()[:, :, None]
    off = ((w / scale).round().clamp(-zero, qmax - zero) * scale - w).abs()
    if column is None:
        return off.pow(2.5).sum(2)
    return (off.square() * column.double().repeat(len(w) // len(column), 1)).sum(2)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [16, 112, 1000])
def test_weighted_errors_are_close(bits, group, path):
    given = arguments(group=group, bits=bits)
    column = torch.rand(3, group, generator=torch.Generator().manual_seed(0))
    found, wanted = range_errors(*given, column).double(), exact(*given, column)
    assert ((found - wanted).abs() <= 2e-3 * wanted).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [16, 112, 1000])
def test_errors_are_close_or_bounds_that_cannot_win(bits, group, path):
    given = arguments(group=group, bits=bits)
    found, wanted = range_errors(*given).double(), exact(*given)
    close = (found - wanted).abs() <= 2e-3 * wanted
    before = found.cummin(0).values.roll(1, 0)
    before[0] = torch.inf
    assert (close | ((found > before) & (found < wanted))).all()
    assert close[0].all()


def test_threads_share_the_groups():
    given = arguments(groups=999, group=128)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(range_errors(*given))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_nan_reaches_the_errors_of_its_group(path):
    w, *rest = arguments()
    w[3, 5] = torch.nan
    nan = range_errors(w, *rest).isnan()
    assert nan[:, 3].all()
    assert nan.sum() == len(nan)


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (
            0,
            torch.zeros(24, 112).double(),
            "w must be a contiguous fp32 matrix on the CPU, got torch.float64",
        ),
        (0, torch.zeros(24, 112, device="meta"), "on meta"),
        (0, torch.zeros(112, 24).T, "w must be a contiguous"),
        (0, torch.zeros(24, 0), r"for w \[24, 0\]"),
        (1, torch.ones(5, 23), r"scale and zero must be \[candidates, 24\], got \[5, 23\]"),
        (2, torch.ones(4, 24), r"scale and zero must be .* and \[4, 24\]"),
        (3, 256, "qmax must be 1 to 255, not 256"),
        (4, torch.ones(5, 112), r"column must be \[rows that divide 24, 112\], got \[5, 112\]"),
        (4, torch.ones(3, 16), r"got \[3, 16\]"),
    ],
)
def test_wrong_arguments_are_named(at, value, says):
    given = [*arguments(), torch.ones(3, 112)]
    given[at] = value
    with pytest.raises(ValueError, match=says):
        range_errors(*given)
