"""What is accepted as a quantized linear, and what is said about it."""

from dataclasses import replace

import pytest
import tiny_models
import torch

from quantkit.algorithms.catalog import algorithm
from quantkit.algorithms.registry import Outcome
from quantkit.algorithms.rtn import rtn
from quantkit.calibration.ranks import ALONE
from quantkit.calibration.walk import Wanted, walk
from quantkit.errors import NumericalError
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.numerics.statistics import Statistics
from quantkit.pipeline.block import check_sound, quantize_block
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.solve import run_steps
from quantkit.plan import build_plan
from quantkit.recipe.recipe import parse_recipe
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


@pytest.fixture
def block(tmp_path):
    """The first block of a tiny Llama, to be rounded to nearest."""
    tiny_models.save(tiny_models.build("llama-gqa"), tmp_path)
    source = Source(read_checkpoint(tmp_path))
    recipe = {"weights": {"algorithm": "rtn", "bits": 4, "group_size": 16}}
    plan = build_plan(parse_recipe(recipe | {"calibration": {"sequence_length": 24}}), source.headers)
    windows = tiny_models.ids(24, batch=4, vocabulary=100)
    blocks = walk(skeleton.build(source), source, plan, windows, Wanted(4, True))
    yield next(blocks)
    blocks.close()


def test_siblings_become_what_each_becomes_alone(block):
    """They are quantized as one matrix, but weights and errors are each one's own."""
    weights = {f"{block.name}.{n}": m.weight.float().clone() for n, m in block.held.items()}
    assert any(len(siblings) > 1 for siblings in block.trace.siblings)
    (result,) = run_steps(ALONE, [quantize_block(block, Clock())], Clock())
    assert result.weights.keys() == weights.keys()
    errors = {layer.name: layer.relative_error for layer in result.layers}
    for name, weight in weights.items():
        config = block.plans[name.removeprefix(f"{block.name}.")].algorithm
        together = result.weights[name]
        alone = algorithm("rtn").quantize(weight, Statistics(), together.grid, torch.float32, config).weight
        assert torch.equal(together.codes, alone.codes)
        assert errors[name] == pytest.approx(alone.relative_error(weight))


@pytest.mark.parametrize("collapsed", ["gate_proj", "up_proj"])
def test_a_collapsed_linear_among_sound_siblings_is_named(block, monkeypatch, collapsed):
    """Its siblings' part of the objective does not hide it."""
    together = next(s for s in block.trace.siblings if any(n.endswith(collapsed) for n in s))
    assert len(together) == 2
    rows = [block.held[n].out_features for n in together]
    starts = 0 if together[0].endswith(collapsed) else rows[0]

    class Collapsing:
        quantize_all = None

        def quantize(self, weight, statistics, grid, dtype, config):
            quantized = rtn(weight, grid, dtype)
            if len(weight) == sum(rows) and weight.shape[1] == block.held[together[0]].in_features:
                quantized.codes[starts : starts + rows[0]] = int(grid.midpoint)
            return Outcome(quantized)

        def needs(self, config):
            return frozenset()

    monkeypatch.setattr("quantkit.pipeline.solve.algorithm", lambda name: Collapsing())
    with pytest.raises(NumericalError, match=rf"\.{collapsed}: collapsed: the quantized weight is zero"):
        run_steps(ALONE, [quantize_block(block, Clock())], Clock())
