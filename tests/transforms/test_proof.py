"""A transform may only fold what leaves the block's function as it was: the block itself is run to prove it."""

from dataclasses import replace

import pytest
import tiny_models
import torch

from quantkit.calibration.walk import Wanted, walk
from quantkit.errors import NumericalError
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.plan import build_plan
from quantkit.recipe.recipe import parse_recipe

RECIPE = {
    "weights": {"algorithm": "rtn", "bits": 4, "group_size": 16},
    "calibration": {"sequence_length": 24},
}


@pytest.fixture
def block(tmp_path):
    """The first block of a tiny Llama, with both streams at its input."""
    tiny_models.save(tiny_models.build("llama-gqa"), tmp_path)
    source = Source(read_checkpoint(tmp_path))
    plan = build_plan(parse_recipe(RECIPE), source.headers)
    windows = tiny_models.ids(24, batch=4, vocabulary=100)
    blocks = walk(skeleton.build(source), source, plan, windows, Wanted(4, True))
    yield next(blocks)
    blocks.close()


def scaled(block, form):
    """The first proved group of this form with several consumers, if it can have them, and a scale for it."""
    groups, _ = block.scaling_groups("")
    group = max((g for g in groups if g.form == form), key=lambda g: len(g.consumers))
    producer = block.module.get_submodule(group.producer).weight
    channels = len(group.rows) if group.rows is not None else producer.shape[0]
    return group, 0.5 + torch.rand(channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["gamma", "rows"])
def test_a_proved_group_keeps_the_function_and_changes_its_weights(block, form):
    group, scale = scaled(block, form)
    chunk = block.chunks()[0]
    before = block.forward(chunk, full=True)
    weight = block.module.get_submodule(group.consumers[0]).weight.clone()
    assert block.fold(group, scale, "") < 1e-4
    torch.testing.assert_close(block.forward(chunk, full=True), before, rtol=1e-3, atol=1e-4)
    assert not torch.equal(block.module.get_submodule(group.consumers[0]).weight, weight)


def test_a_group_that_lacks_a_consumer_is_refused(block):
    """What it divides is not multiplied everywhere; the message names the producer, the rest and the way out."""
    group, scale = scaled(block, "gamma")
    assert len(group.consumers) > 1
    partial = replace(group, consumers=group.consumers[:1])
    with pytest.raises(NumericalError) as refused:
        block.fold(partial, scale, "leave the transform out")
    told = str(refused.value)
    assert told.startswith(
        f"folding scales from {group.producer} into {group.consumers[0]} in block 0 changed"
    )
    assert told.endswith("leave the transform out")


def test_a_group_whose_channels_are_mixed_up_is_refused(block):
    group, scale = scaled(block, "rows")
    assert group.rows is not None
    with pytest.raises(NumericalError, match="changed its output by"):
        block.fold(replace(group, rows=group.rows.flip(0)), scale, "")
