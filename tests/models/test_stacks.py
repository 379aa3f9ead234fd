"""Stacks of experts on disk are one tensor for every linear of every expert, and are read as such."""

from pathlib import Path

import pytest
import tiny_mixtures
import tiny_models
import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from quantkit.models import skeleton
from quantkit.models.experts import Experts, part_of, stack_of
from quantkit.models.headers import read_checkpoint
from quantkit.models.places import _Group, _parts
from quantkit.models.source import Source
from quantkit.models.stacks import taken_apart
from quantkit.models.tensors import TensorInfo

HIDDEN, WIDTH = 64, 96


def info(name, *shape):
    return TensorInfo(name, "F32", shape, Path("model.safetensors"), 0, 4 * torch.Size(shape).numel())


@pytest.mark.parametrize(
    ("name", "shape", "experts", "linears"),
    [
        (
            "mlp.experts.gate_up_proj",
            (2, 192, 64),
            "mlp.experts",
            {"gate_proj": (96, 64), "up_proj": (96, 64)},
        ),
        (
            "mlp.experts.gate_up_proj",
            (2, 64, 192),
            "mlp.experts",
            {"gate_proj": (96, 64), "up_proj": (96, 64)},
        ),
        ("mlp.experts.down_proj", (2, 64, 96), "mlp.experts", {"down_proj": (64, 96)}),
        ("mlp.experts.down_proj", (2, 96, 64), "mlp.experts", {"down_proj": (64, 96)}),
        ("mixer.experts.up_proj", (2, 96, 64), "mixer.experts", {"up_proj": (96, 64)}),
        ("moe.experts.fc1.weight", (2, 64, 192), "moe.experts", {"gate_proj": (96, 64), "up_proj": (96, 64)}),
        (
            "block_sparse_moe.input_linear.weight",
            (2, 192, 64),
            "block_sparse_moe.experts",
            {"gate_proj": (96, 64), "up_proj": (96, 64)},
        ),
    ],
)
def test_weights_of_a_stack(name, shape, experts, linears):
    stack = info(name, *shape)
    found = taken_apart({"hidden_size": HIDDEN}, {name: stack})
    wanted = {f"{experts}.{e}.{leaf}.weight": size for e in range(2) for leaf, size in linears.items()}
    assert {n: each.shape for n, each in found.items()} == wanted
    assert sum(each.nbytes for each in found.values()) == stack.nbytes
    assert all(each.parts == (stack,) for each in found.values())


@pytest.mark.parametrize("turned", [False, True])
def test_gate_and_up_beside_down_say_how_they_lie(turned):
    """Experts whose inputs are not as wide as the hidden states of the model."""
    sizes = {"gate_up_proj": (2, 64, 16), "down_proj": (2, 16, 32)}
    shapes = {f"x.experts.{n}": (s[0], s[2], s[1]) if turned else s for n, s in sizes.items()}
    found = taken_apart({"hidden_size": HIDDEN}, {n: info(n, *shape) for n, shape in shapes.items()})
    assert found["x.experts.0.gate_proj.weight"].shape == (32, 16)
    assert found["x.experts.1.down_proj.weight"].shape == (16, 32)


def test_stacks_with_the_rows_of_all_experts():
    name, config = "h.0.ffn.experts.mlp.w2", {"d_model": HIDDEN, "ffn_config": {"moe_num_experts": 3}}
    found = taken_apart(config, {name: info(name, 3 * WIDTH, HIDDEN)})
    assert {n: each.shape for n, each in found.items()} == {
        f"h.0.ffn.experts.{e}.down_proj.weight": (HIDDEN, WIDTH) for e in range(3)
    }
    odd = {name: info(name, 3 * WIDTH + 1, HIDDEN)}
    assert taken_apart(config, odd) == odd


def test_a_list_of_experts_that_two_modules_share():
    """The first half of Ernie 4.5 VL's are for text, the others, of another width, for pictures."""
    rules = get_checkpoint_conversion_mapping("ernie4_5_vl_moe")
    rule = next(each for each in rules if list(each.source_patterns)[1:] == ["experts.*.up_proj.weight"])
    model = nn.ModuleDict(
        {f"{sense}_moe": nn.ModuleDict({"experts": nn.Module()}) for sense in ("text", "vision")}
    )
    sizes = {
        f"experts.{e}.{leaf}.weight": (6 if e < 2 else 4, 8)
        for e in range(4)
        for leaf in ("gate_proj", "up_proj")
    }
    disk = {
        pattern: [name for name in sizes if name.endswith(pattern.partition("*")[2])]
        for pattern in rule.source_patterns
    }
    group = _Group(rule.target_patterns[0], rule, disk, tuple(rule.target_patterns))
    found = {place.disk: place for place in _parts(model, group, sizes, {})}
    assert found.keys() == sizes.keys()
    for name, wanted in {
        "experts.1.up_proj.weight": ("text_moe.experts.gate_up_proj", 1, (6, 12)),
        "experts.2.gate_proj.weight": ("vision_moe.experts.gate_up_proj", 0, (0, 4)),
        "experts.3.up_proj.weight": ("vision_moe.experts.gate_up_proj", 1, (4, 8)),
    }.items():
        assert (found[name].parameter, found[name].index, found[name].rows) == wanted


def test_biases_of_a_stack_and_what_is_none():
    tensors = {
        n: info(n, *shape)
        for n, shape in (("x.experts.gate_up_proj_bias", (2, 192)), ("x.up_proj", (2, 3, 4)))
    }
    found = taken_apart({"hidden_size": HIDDEN}, tensors)
    assert found["x.experts.1.up_proj.bias"].shape == (96,)
    assert found["x.up_proj"] == tensors["x.up_proj"]
    assert "x.experts.gate_up_proj_bias" not in found


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "granitemoe", "dbrx", "mixtral"])
def test_every_linear_is_read_as_the_model_has_it(name, tmp_path):
    model = tiny_mixtures.build(name)
    source = Source(read_checkpoint(tiny_models.save(model, tmp_path)))
    empty = skeleton.build(source)
    places = skeleton.places(empty)
    stacked = tiny_mixtures.experts(model)
    found = {n: m for n, m in empty.named_modules() if isinstance(m, Experts)}
    assert found.keys() == stacked.keys()
    for where, experts in found.items():
        for role, leaf in experts.names.items():
            holder = stacked[where].get_parameter(stack_of(role, "weight", experts.shape))
            wanted = part_of(holder, 2, role, "weight", experts.shape)
            (place,) = places.by_parameter[f"{where}.2.{leaf}.weight"]
            assert torch.equal(source.tensor(place.disk), wanted)


def test_a_stack_can_be_stored_for_a_family_with_single_tensors(tmp_path):
    model = tiny_mixtures.build("qwen3_moe")
    source = Source(read_checkpoint(tiny_mixtures.stacked(tiny_models.save(model, tmp_path))))
    skeleton.build(source)
    up = model.model.layers[1].mlp.experts.gate_up_proj[3, WIDTH:]
    assert torch.equal(source.tensor("model.layers.1.mlp.experts.3.up_proj.weight"), up)
