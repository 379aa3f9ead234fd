"""What is accepted as a quantized linear, and what is said about it."""

from dataclasses import replace

import pytest
import torch

from quantkit.algorithms.registry import Outcome
from quantkit.algorithms.rtn import rtn
from quantkit.errors import NumericalError
from quantkit.pipeline.block import check_sound
from quantkit.scheme import NUMBERS, Grid, integer

GRIDS = [
    integer(4, 32),
    integer(4, 32, False),
    Grid(NUMBERS["nf4"], "group", 32),
    Grid(NUMBERS["fp8_e4m3"], "channel"),
]


def weight_of(n=16, k=64):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_that_are_all_zero_are_refused(grid):
    """Even where the objective says nothing against it."""
    w = weight_of()
    quantized = rtn(w, grid, torch.float32)
    zero = grid.midpoint if quantized.zero is None else quantized.zero.repeat_interleave(32, 1)
    empty = replace(quantized, codes=torch.zeros_like(quantized.codes) + zero)
    assert empty.is_zero
    assert not quantized.is_zero
    good = torch.zeros(16), torch.ones(16)
    for outcome in (Outcome(empty), Outcome(empty, *good)):
        with pytest.raises(NumericalError, match=r"a\.b: collapsed: the quantized weight is zero"):
            check_sound("a.b", w, outcome)
    check_sound("a.b", w, Outcome(quantized, *good))


def test_a_weight_of_zeros_is_sound():
    w = torch.zeros(16, 64)
    assert check_sound("a", w, Outcome(rtn(w, integer(4, 32), torch.float32)))[:3] == (0, 0, 0)


def test_an_objective_no_better_than_zero_is_refused():
    quantized = rtn(weight_of(), integer(4, 32), torch.float32)
    with pytest.raises(NumericalError, match="a: collapsed: the quantized weight is no better than zero"):
        check_sound("a", weight_of(), Outcome(quantized, torch.full((16,), 1.01), torch.ones(16)))


def test_a_weight_out_of_all_proportion_is_refused_and_a_far_one_noted():
    w = weight_of()
    quantized = rtn(w, integer(4, 32), torch.float32)
    good = torch.zeros(16), torch.ones(16)
    for factor, wanted in ((1, 0), (5, 1)):
        sound = check_sound("a", w, Outcome(replace(quantized, scale=quantized.scale * factor), *good))
        assert len(sound.notes) == wanted
        assert sound.weight_error == pytest.approx((factor - 1) ** 2, abs=1)
    with pytest.raises(NumericalError, match="of the weight 9"):
        check_sound("a", w, Outcome(replace(quantized, scale=quantized.scale * 100), *good))


def test_rows_no_better_than_zero_are_counted():
    w = weight_of()
    quantized = rtn(w, integer(4, 32), torch.float32)
    codes = quantized.codes.clone()
    codes[3:5] = 8
    sound = check_sound("a", w, Outcome(replace(quantized, codes=codes)))
    assert sound.worst_row == 1
    assert sound.notes == ["2 of 16 rows are no better than zero; use more bits or a smaller group"]
    assert check_sound("a", w, Outcome(quantized)).worst_row < 0.03


def test_the_outcome_of_some_rows():
    quantized = rtn(weight_of(), integer(4, 32, False), torch.float32)
    whole = Outcome(
        quantized, torch.arange(16.0), torch.ones(16), {"count": torch.arange(16)}, {"fact": 1}, ["why"]
    )
    part = whole.rows(slice(4, 6))
    assert torch.equal(part.weight.dequantize(), quantized.dequantize()[4:6])
    assert (part.error.tolist(), part.norm.tolist()) == ([4, 5], [1, 1])
    assert (part.counts["count"].tolist(), part.details, part.fallbacks) == ([4, 5], {"fact": 1}, ["why"])
