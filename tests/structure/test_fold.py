"""Folding the right scales changes nothing, and a wrong fold is stopped."""

import pytest
import tiny_models
import torch
from torch import nn

from quantkit.errors import NumericalError
from quantkit.structure.discover import discover
from quantkit.structure.fold import ScalingGroup, check_invariance, fold, in_float64


def gemma_post_attention_norm(block):
    mlp = ("mlp.gate_proj", "mlp.up_proj")
    return ScalingGroup(mlp, "post_attention_layernorm", "one_plus_gamma", None, None, "mlp")


def heads_shared_in_turns(block):
    """As if query head h read value head h % 2, not h // 2."""
    expand, rows = torch.arange(64) % 32, torch.arange(32)
    return ScalingGroup(("self_attn.o_proj",), "self_attn.v_proj", "rows", rows, expand, "self_attn.o_proj")


def only_two_of_three(block):
    consumers = ("self_attn.q_proj", "self_attn.k_proj")
    return ScalingGroup(consumers, "input_layernorm", "gamma", None, None, "self_attn")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gemma2", gemma_post_attention_norm),
        ("llama-gqa", heads_shared_in_turns),
        ("llama", only_two_of_three),
    ],
)
def test_check_invariance_stops_a_wrong_fold(name, wrong):
    block, call = tiny_models.block_and_call(name)
    group = wrong(block)
    s = tiny_models.random_scales(block, group)
    with pytest.raises(NumericalError, match="moved the block's output"):
        check_invariance(block, *call, lambda b: fold(b, group, s), 1e-3)


def test_independent_scales_per_query_head_change_the_output():
    block, call = tiny_models.block_and_call("llama-gqa")
    generator = torch.Generator().manual_seed(0)
    s = 0.5 + torch.rand(64, generator=generator)

    def apart(b):
        b.self_attn.v_proj.weight.data /= s[:32, None]
        b.self_attn.o_proj.weight.data *= s

    with pytest.raises(NumericalError):
        check_invariance(block, *call, apart, 1e-3)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gemma3", "opt"])
def test_check_invariance_passes_right_folds_in_fp32(name):
    block, call = tiny_models.block_and_call(name)
    for group in discover(block, *call)[0]:
        s = tiny_models.random_scales(block, group).float()
        moved = check_invariance(block, *call, lambda b, g=group, s=s: fold(b, g, s), 1e-5)
        assert moved < 1e-5


@pytest.mark.parametrize(
    ("name", "producer"),
    [("llama", "input_layernorm"), ("gemma2", "pre_feedforward_layernorm"), ("gpt2", "ln_2")],
)
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_a_norm_stored_in_half_precision_keeps_the_function(name, producer, storage):
    block, call = tiny_models.block_and_call(name)
    norm = block.get_submodule(producer)
    norm.weight.data = norm.weight.data.to(storage).float()
    if getattr(norm, "bias", None) is not None:
        norm.bias.data.zero_()  # a bias has no consumer to take what its rounding leaves
    group = next(g for g in discover(block, *call)[0] if g.producer == producer)
    s = tiny_models.random_scales(block, group, low=0.5, high=2.0).float()
    folded = {}
    check_invariance(block, *call, lambda b: folded.update(s=fold(b, group, s, storage)), 2e-6)
    assert torch.equal(norm.weight, norm.weight.to(storage).float())
    assert torch.allclose(folded["s"], s, rtol=0.05)
    assert not torch.equal(folded["s"], s)


@pytest.mark.parametrize("producer", ["ln_1", "attn.c_attn"])
def test_a_bias_is_what_will_be_stored(producer):
    block, call = tiny_models.block_and_call("gpt2")
    block.get_submodule(producer).bias.data.copy_(block.get_submodule(producer).bias.bfloat16())
    group = next(g for g in discover(block, *call)[0] if g.producer == producer)
    s = tiny_models.random_scales(block, group).float()
    check_invariance(block, *call, lambda b: fold(b, group, s, torch.bfloat16), 1e-2)
    bias = block.get_submodule(producer).bias
    assert torch.equal(bias, bias.bfloat16().float())


def test_dead_and_overflowing_channels_keep_their_weight():
    block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    block[0].weight.data = torch.tensor([0.0, 1.0, 1.0, 1.0])
    before = block[1].weight.data.clone()
    group = ScalingGroup(("1",), "0", "gamma", None, None, "1")
    s = fold(block, group, torch.tensor([2.0, 1e-6, 1e9, 2.0]), torch.float16)
    assert s.tolist() == [1.0, 1.0, 1.0, 2.0]
    assert block[0].weight.tolist() == [0.0, 1.0, 1.0, 0.5]
    assert torch.equal(block[1].weight, before * s)


def test_casts_of_a_proof_are_to_float64_and_what_is_read_meanwhile_is_not():
    x = torch.ones(2, dtype=torch.float64)
    with in_float64():
        made = [x.float(), x.to(torch.float32), x.type(torch.bfloat16), x.softmax(0, dtype=torch.float32)]
        read = torch.empty(2, dtype=torch.float32)
    assert {each.dtype for each in made} == {torch.float64}
    assert read.dtype == torch.float32
    assert x.float().dtype == torch.float32
