"""SmoothQuant: equation 4 on every group of a block, which computes what it did."""

from dataclasses import replace

import pytest
import torch

from quantkit.numerics.inputs import round_inputs
from quantkit.recipe.recipe import TRANSFORMS
from quantkit.scheme import PRESETS
from quantkit.transforms.catalog import transform
from quantkit.transforms.equalize import scales
from quantkit.transforms.groups import rounded

FAMILIES = ("llama-gqa", "gemma2", "opt", "phi3-gqa", "gpt2", "falcon-new")


def outliers(model):
    """Two channels of the MLP's input are 64 times larger in all blocks, which compute what they did."""
    for block in model.model.layers:
        block.post_attention_layernorm.weight[[3, 40]] *= 64
        for linear in (block.mlp.gate_proj, block.mlp.up_proj):
            linear.weight[:, [3, 40]] /= 64


def smooth(block, **options):
    """Apply the transform: the report's entries of groups that were smoothed."""
    report = transform("smoothquant").apply(block, TRANSFORMS["smoothquant"](name="smoothquant", **options))
    return [entry for entry in report if "left_out" not in entry]


def extremes(block, consumers):
    """(max|x|, max|w|) of each input column of linears."""
    inputs = block.inputs_of(consumers[:1], "amax", None)[consumers[0]]
    weights = [block.module.get_submodule(n).weight.abs().amax(0) for n in consumers]
    return inputs, torch.stack(weights).amax(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_computes_what_it_did(opened, family):
    block = opened(family)
    chunk = block.chunks()[0]
    before = block.forward(chunk, full=True)
    report = smooth(block)
    torch.testing.assert_close(block.forward(chunk, full=True), before, rtol=1e-4, atol=1e-4)
    assert report
    assert all(entry["output_change"] < 1e-5 for entry in report)


def test_every_group_of_a_llama_is_smoothed_with_one_scale_for_shared_values(opened):
    report = {entry["producer"]: entry["consumers"] for entry in smooth(opened("llama-gqa"))}
    assert report == {
        "input_layernorm": [f"self_attn.{n}_proj" for n in "qkv"],
        "self_attn.v_proj": ["self_attn.o_proj"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.up_proj": ["mlp.down_proj"],
    }


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", ["llama", "llama-gqa"])
def test_alpha_says_what_becomes_level(opened, family, alpha):
    """1: the largest input of every channel is 1. 0: the largest weight is. 0.5: both are the same.

    True of the block as it is in the end, for all groups together. Where heads share a channel, for the larger of them.
    """
    block = opened(family)
    for entry in smooth(block, alpha=alpha):
        inputs, weights = extremes(block, entry["consumers"])
        if family == "llama-gqa" and entry["producer"] == "self_attn.v_proj":
            inputs, weights = (
                t.view(2, 2, 16).amax(1) for t in (inputs, weights)
            )  # (kv heads, queries, head)
        level = {0.0: weights, 0.5: inputs / weights, 1.0: inputs}[alpha]
        torch.testing.assert_close(level, torch.ones_like(level), rtol=1e-3, atol=1e-3)


def test_a_channel_without_inputs_or_weights_stays():
    s = scales(torch.tensor([0.0, 2.0, 2.0]), torch.tensor([3.0, 0.0, 8.0]), 0.5)
    assert s.tolist() == [1.0, 1.0, 0.5]


def test_scales_stay_within_what_float16_holds():
    s = scales(torch.tensor([1e9, 1e-9]), torch.tensor([1e-9, 1e9]), 0.5)
    assert s.tolist() == pytest.approx([1e4, 1e-4])


def test_dead_channels_are_noted_and_left(opened):
    def kill(model):
        model.model.layers[0].input_layernorm.weight[:16] = 0

    block = opened("llama-gqa", change=kill)
    weight = block.module.self_attn.q_proj.weight[:, :16].clone()
    entry = smooth(block)[0]
    assert entry["note"].startswith("16 of 64 columns are dead")
    assert torch.equal(block.module.self_attn.q_proj.weight[:, :16], weight)


def test_only_as_many_windows_are_looked_at_as_asked(opened, monkeypatch):
    monkeypatch.setattr("quantkit.calibration.walk.chunk_windows", lambda plan, windows: 1)
    block = opened("llama-gqa")
    one = block.inputs_of(["mlp.down_proj"], "amax", 1)["mlp.down_proj"]
    every = block.inputs_of(["mlp.down_proj"], "amax", None)["mlp.down_proj"]
    assert (every >= one).all()
    assert (every > one).any()
    found = smooth(block, windows=1, alpha=1.0)
    assert found[-1]["input_max"] == pytest.approx(float(one.max()))


def test_a_group_that_would_change_a_linear_outside_the_plan_is_left_out_and_said(opened):
    rules = [{"match": "*.up_proj", "skip": True}, {"match": "*.gate_proj", "skip": True}]
    block = opened("llama-gqa", rules)
    report = transform("smoothquant").apply(block, TRANSFORMS["smoothquant"](name="smoothquant"))
    left = {tuple(e["consumers"]): e["left_out"] for e in report if "left_out" in e}
    assert list(left) == [("mlp.down_proj",)]
    assert left["mlp.down_proj",].startswith("mlp.up_proj would change too")


def test_inputs_with_outliers_lose_less_to_8_bits_per_tensor(opened):
    def error(block):
        """Relative error of gate_proj's output with its input rounded to 8 bits of the largest."""
        (args, _, out), *_ = block.observe(["mlp.gate_proj"], 4)["mlp.gate_proj"]
        step = args[0].abs().max() / 127.5
        rounded = block.output(block.module.mlp.gate_proj, ((args[0] / step).round() * step,), {})
        return float((rounded - out).square().sum() / out.square().sum())

    block = opened("llama-gqa", change=outliers)
    before = error(block)
    smooth(block)
    assert error(block) < 0.02 * before


def test_a_norm_takes_what_its_dtype_can_hold(opened):
    """bfloat16 keeps 8 bits of a norm; the weights take the quotient it really has."""
    block = opened("llama-gqa", dtype=torch.bfloat16)
    assert all(entry["output_change"] < 1e-5 for entry in smooth(block) if "norm" in entry["producer"])
    assert {t.dtype for t in block.changed.values()} == {torch.bfloat16}


def test_alpha_is_by_default_what_the_literature_says_of_the_family(opened):
    assert {entry["alpha"] for entry in smooth(opened("llama-gqa"))} == {0.8}
    assert {entry["alpha"] for entry in smooth(opened("opt"))} == {0.5}


@pytest.mark.parametrize("preset", ["W8A8", "W8A8_STATIC", "W8A16"])
def test_alpha_is_searched_on_the_output_with_rounded_inputs(opened, preset):
    """The choice is never worse than doing nothing. Of a scheme without inputs only the weights are rounded."""
    block = opened("llama-gqa", change=outliers)
    block.plans = {n: replace(plan, scheme=PRESETS[preset]) for n, plan in block.plans.items()}
    report = {entry["producer"]: entry for entry in smooth(block, alpha="auto", grid=4)}
    assert len(report) == 4
    assert all(entry["loss"] <= entry["identity_loss"] for entry in report.values())
    mlp = report["post_attention_layernorm"]
    assert mlp["alpha"] is not None
    assert mlp["loss"] < 0.1 * mlp["identity_loss"]
    assert all(held.override is None for held in block.held.values())


def test_a_search_measures_what_then_runs(opened):
    """The loss that is reported is the error of the MLP with the folded weights and inputs on their grids."""
    block = opened("llama-gqa", change=outliers)
    block.plans = {n: replace(plan, scheme=PRESETS["W8A8"]) for n, plan in block.plans.items()}
    calls = block.observe(["mlp"], 4)["mlp"]
    before = block.module.post_attention_layernorm.weight.clone()
    entry = next(
        e for e in smooth(block, alpha="auto", grid=2) if e["producer"] == "post_attention_layernorm"
    )
    total = count = 0
    for name in entry["consumers"]:
        held = block.held[name]
        held.override = rounded(held.weight, PRESETS["W8A8"].weights, torch.float32)
        held.register_forward_pre_hook(lambda module, args: round_inputs(args[0], PRESETS["W8A8"].inputs))
    norm = block.module.post_attention_layernorm.weight / before
    for args, kwargs, wanted in calls:
        out = block.output(block.module.mlp, (args[0] * norm,), kwargs)
        total, count = total + float((out - wanted).square().sum()), count + wanted.numel()
    assert entry["loss"] == pytest.approx(total / count, rel=1e-3)
