"""SmoothQuant+ on one block: it computes what it did, and what a strength means."""

import pytest
import torch

from quantkit.recipe.recipe import TRANSFORMS
from quantkit.transforms.catalog import transform
from quantkit.transforms.equalize import channel_maxima
from quantkit.transforms.smoothquant_plus import groups_of, try_on

STRENGTHS = [step / 20 for step in range(21)]


def largest_inputs(block):
    """max|x| of every column, by the consumers of each group."""
    found = block.inputs_of([g.consumers[0] for g in groups_of(block)], "amax", None)
    return {g.consumers: found[g.consumers[0]] for g in groups_of(block)}


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "opt", "phi3-gqa", "gpt2"])
def test_the_block_computes_what_it_did_with_every_strength(opened, family):
    block = opened(family)
    chunk = block.chunks()[0]
    before, inputs = block.forward(chunk, full=True), largest_inputs(block)
    for strength in STRENGTHS:
        with block.trial(groups_of(block)):
            try_on(block, strength, inputs)
            after = block.forward(chunk, full=True)
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
            assert not torch.equal(after, before)


def test_a_trial_leaves_no_trace(opened):
    block = opened("llama-gqa")
    weights = {name: p.clone() for name, p in block.module.named_parameters()}
    with block.trial(groups_of(block)):
        try_on(block, 0.5, largest_inputs(block))
        assert any(not torch.equal(p, weights[name]) for name, p in block.module.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in block.module.named_parameters())
    assert block.changed == {}


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_strength_0_levels_the_weights_and_strength_1_the_inputs(opened, strength):
    """0: the largest weight of every channel, over all consumers, is 1. 1: the largest input is. 0.5: both agree."""
    block = opened("llama-gqa")
    config = TRANSFORMS["smoothquant_plus"](name="smoothquant_plus", strength=strength)
    report = transform("smoothquant_plus").apply(block, config)
    assert len(report) == 4
    assert all(entry["output_change"] < 1e-5 for entry in report)
    for group in groups_of(block):
        inputs, weights = channel_maxima(block, group, largest_inputs(block)[group.consumers])
        level = {0.0: weights, 0.5: inputs / weights, 1.0: inputs}[strength]
        torch.testing.assert_close(level, torch.ones_like(level), rtol=1e-3, atol=1e-3)


def test_a_trial_smooths_as_the_transform_does(opened):
    block = opened("llama-gqa")
    config = TRANSFORMS["smoothquant_plus"](name="smoothquant_plus", strength=0.55)
    with block.trial(groups_of(block)):
        try_on(block, 0.55, largest_inputs(block))
        tried = {name: p.data for name, p in block.module.named_parameters()}
    transform("smoothquant_plus").apply(block, config)
    assert all(torch.equal(p, tried[name]) for name, p in block.module.named_parameters())


def test_no_smoothing_changes_nothing(opened):
    block = opened("llama-gqa")
    weights = {name: p.clone() for name, p in block.module.named_parameters()}
    config = TRANSFORMS["smoothquant_plus"](name="smoothquant_plus", strength="none")
    assert transform("smoothquant_plus").apply(block, config) == []
    assert all(torch.equal(p, weights[name]) for name, p in block.module.named_parameters())
