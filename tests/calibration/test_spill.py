"""Tensors in a file: what was written is what is read, and space is used again."""

import pytest
import torch

from quantkit.calibration.spill import Spill, Thrift
from quantkit.errors import OutputError


@pytest.fixture
def spill(tmp_path):
    return Spill(tmp_path / "made" / "here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(5,), (7, 3), (6, 4, 5), (0, 4), (300, 2, 700)])
def test_rows_come_back(spill, dtype, shape):
    wanted = torch.randn(shape).mul(100).to(dtype)
    found = spill.copy(wanted)
    assert found.shape == wanted.shape
    assert (len(found), found.numel(), found.nbytes) == (len(wanted), wanted.numel(), wanted.nbytes)
    n = len(wanted)
    for rows in (slice(None), slice(0, n // 2), slice(n // 2, None), slice(n, n + 3), slice(1, 100)):
        assert torch.equal(found[rows], wanted[rows])
    numbers = torch.arange(n).flip(0)[::2]
    assert torch.equal(found[numbers], wanted[numbers])
    if len(shape) == 3 and n:
        assert torch.equal(found[1:2, 0:2], wanted[1:2, 0:2])
    assert torch.equal(torch.cat([found[piece] for piece in found.pieces()] or [wanted]), wanted)


def test_rows_are_written_in_place_and_what_is_read_is_a_copy(spill):
    found, wanted = spill.zeros(6, 3), torch.zeros(6, 3)
    before = found[:]
    for rows in (slice(1, 3), torch.tensor([5, 0])):
        values = torch.randn(2, 3)
        found[rows] = values
        wanted[rows] = values
    assert torch.equal(found[:], wanted)
    assert not before.any()
    found[:][:] = 7
    assert torch.equal(found[:], wanted)
    for values in (torch.zeros(1, 3), torch.zeros(2, 3).double()):
        with pytest.raises(ValueError, match="is not 2 rows of Spilled"):
            found[0:2] = values


def test_space_of_what_is_gone_is_used_again(spill):
    other = spill.zeros(4)
    for number in range(5):
        one = spill.copy(torch.full((100, 10), float(number)))
        assert one[7:8].eq(number).all()
        del one
    again = spill.zeros(100, 10)
    assert not again[:].any()
    assert not other[:].any()
    assert spill.size == 16 + 4000


def test_nothing_lies_in_the_folder(spill, tmp_path):
    spill.copy(torch.ones(1000))
    assert list((tmp_path / "made" / "here").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        Spill(tmp_path / "file" / "below")


@pytest.mark.parametrize("spilled", [True, False])
def test_the_first_rows_are_a_copy(spill, spilled):
    rows = torch.arange(12.0).view(6, 2)
    copy = Thrift(spill if spilled else None).first(rows, 4)
    assert torch.equal(copy[:], rows[:4])
    copy[0:1] = torch.full((1, 2), 9.0)
    assert rows[0].tolist() == [0, 1]
