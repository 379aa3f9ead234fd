"""`QuantExperts` gives what the loop over packed linears gives, and leaves to it what it does not take."""

import copy
import io
import re
from dataclasses import replace

import packed_experts
import pytest
import tiny_mixtures
import torch
from quantkit_kernels.cpu import library

from quantkit.checkpoint.load import lay_out
from quantkit.layers.quant_experts import QuantExperts, fuse_experts
from quantkit.layers.quant_linear import QuantLinear
from quantkit.scheme import INT8_TOKEN, integer

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")
IDS = torch.randint(4, 128, (1, 24), generator=torch.Generator().manual_seed(0))
TAKEN = [name for name in tiny_mixtures.MIXTURES if name != "llama4"]


def four_bits(name):
    return integer(4, 32) if ".experts." in name else None


def tiny(name="qwen3_moe", grid=four_bits, inputs=None):
    return packed_experts.packed(packed_experts.apart(tiny_mixtures.build(name)), grid, inputs)


def one_by_one(model):
    """Logits of the loop over linears, on the same kernels."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare("cpu", model.dtype)
    return model(input_ids=IDS).logits


def fused(model):
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


@torch.no_grad()
@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_those_of_the_loop(name, dtype):
    model = tiny(name).to(dtype)
    wanted, step = one_by_one(model), model(input_ids=IDS[:, :1]).logits
    assert fuse_experts(model) == {}
    assert fused(model)
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    assert torch.equal(model(input_ids=IDS[:, :1]).logits, step)


@torch.no_grad()
def test_every_backend_gives_the_same_names_and_about_the_same_logits():
    model = tiny()
    reference = model(input_ids=IDS).logits
    names = [name for name, _ in model.named_modules()]
    lay_out(model, "cpu")
    assert fused(model)
    assert [name for name, _ in model.named_modules()] == names
    assert (model(input_ids=IDS).logits - reference).abs().max() < 1e-5 * reference.abs().max()


def test_experts_that_differ_run_one_by_one_and_a_warning_names_them():
    def grid(name):
        return (
            integer(8 if name.endswith("1.mlp.experts.2.down_proj") else 4, 32)
            if "experts." in name
            else None
        )

    model = tiny(grid=grid)
    with pytest.warns(
        UserWarning, match=r"experts of 1 layers run one by one.*layers\.1\.mlp\.experts: they differ"
    ):
        lay_out(model, "cpu")
    assert len(fused(model)) == 1


@pytest.mark.parametrize(
    ("name", "grid", "inputs", "why"),
    [
        ("llama4", four_bits, None, "tokens of its own"),
        (
            "mixtral",
            lambda n: integer(4, 32) if "experts.2" in n else None,
            None,
            r"6 of their 8 .* not packed",
        ),
        ("mixtral", four_bits, replace(INT8_TOKEN, symmetric=False), "rounded before the kernel"),
    ],
    ids=["slotted", "dense", "inputs"],
)
def test_what_is_left_to_the_loop_is_named(name, grid, inputs, why):
    model = tiny(name, grid, inputs)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare("cpu", torch.float32)
    left = fuse_experts(model)
    assert left
    for said in left.values():
        assert re.search(why, said), said
    assert not fused(model)


def test_experts_on_the_stored_tensors_are_left_alone():
    left = fuse_experts(tiny())
    assert all("'reference' multiplies by the stored tensors" in why for why in left.values())
    assert left


def test_gradients_go_through_the_loop():
    model = tiny()
    lay_out(model, "cpu")
    (layer, *_), x = fused(model), torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    index, weights = torch.tensor([[0, 3]] * 6), torch.full((6, 2), 0.5)
    wanted = x.clone().requires_grad_()
    layer(wanted, index, weights).square().sum().backward()
    assert wanted.grad.abs().max() > 0
    assert (layer(x, index, weights) - layer(wanted, index, weights)).abs().max() < 1e-6


@torch.no_grad()
def test_copies_and_pickles_have_their_own_weights():
    model = tiny("gpt_oss")
    lay_out(model, "cpu")
    wanted = model(input_ids=IDS).logits
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    for layer in fused(model):
        for module in layer.modules():
            if isinstance(module, QuantLinear):
                module.tensors["units"].fill_(0xFF)
    assert torch.equal(twin(input_ids=IDS).logits, wanted)
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    assert not torch.equal(model(input_ids=IDS).logits, wanted)


@torch.no_grad()
def test_linears_that_were_replaced_are_used():
    model = tiny("mixtral")
    lay_out(model, "cpu")
    model(input_ids=IDS)
    layer = fused(model)[0]
    layer.get_submodule("0").gate_proj = torch.nn.Linear(64, 96, bias=False)
    model.to(torch.float32)
    found = layer(torch.ones(3, 64), torch.tensor([[0], [1], [0]]), torch.ones(3, 1))
    torch.testing.assert_close(found[0], layer.unfused.run(0, torch.ones(1, 64))[0])


def test_a_choice_that_is_no_expert_goes_through_the_loop():
    """As with experts on other processes, whose tokens get nothing here."""
    model = tiny()
    lay_out(model, "cpu")
    layer, x = fused(model)[0], torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    found = layer(x, torch.tensor([[0, 4], [1, 4]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert torch.equal(found, layer(x, torch.tensor([[0], [1]]), torch.ones(2, 1)))


def test_no_tokens():
    model = tiny()
    lay_out(model, "cpu")
    empty = torch.zeros(0, 64)
    assert fused(model)[0](empty, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)).shape == (0, 64)
