"""Mixtures of experts in the native decoder against transformers' eager model."""

import re

import packed_experts
import pytest
import tiny_mixtures
import torch
from quantkit_kernels.cpu import library
from torch import nn

from quantkit.layers.quant_experts import fuse_experts
from quantkit.layers.quant_linear import QuantLinear
from quantkit.runtime import NativeDecoder, native
from quantkit.scheme import integer

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

KNOWN = {
    "mixtral": {},
    "qwen3_moe": {},
    "qwen3_moe-raw": {"norm_topk_prob": False},
    "qwen3_moe-dense-first": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
    "qwen2_moe-normed": {"shared_expert_intermediate_size": 64, "norm_topk_prob": True},
    "olmoe": {},
    "olmoe-many": {"num_experts": 9, "num_experts_per_tok": 5},
}
IDS = torch.randint(4, 128, (100,), generator=torch.Generator().manual_seed(0))
TOLERANCE = 2e-5  # of the largest logit, as for dense models


def tiny(name, grid=None, apart=True, **overrides):
    """A tiny mixture with packed linears, the head aside."""
    known = name if name in tiny_mixtures.MIXTURES else name.rpartition("-")[0]
    model = tiny_mixtures.build(known, **(KNOWN[name] | overrides))
    model = packed_experts.apart(model) if apart else model
    return packed_experts.packed(model, grid or integer(4, 32))


def decoder(model, **options):
    found = native(model, **options)
    assert isinstance(found, NativeDecoder), found
    return found


@torch.no_grad()
def eager(model, ids=IDS):
    return model(input_ids=ids[None]).logits[0]


def assert_close(found, truth, tolerance=TOLERANCE):
    error = float((found - truth).abs().max() / truth.abs().max())
    assert error < tolerance, f"off by {error:.2g} of the largest logit"


@pytest.mark.parametrize("name", KNOWN)
def test_logits_are_those_of_the_eager_model(name):
    model = tiny(name)
    assert_close(decoder(model).start().append(IDS, keep=100), eager(model))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe-normed", "olmoe-many"])
def test_token_by_token_equals_the_whole_prompt(name):
    model = tiny(name)
    sequence, found = decoder(model).start(), []
    for token in IDS[:20].split(1):
        found.append(sequence.append(token))
    assert_close(torch.cat(found), eager(model, IDS[:20]))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads_gives_about_the_same(threads):
    """Work is shared out by (expert, rows), by slots and by columns; some threads get nothing."""
    model, before, found = tiny("qwen2_moe"), torch.get_num_threads(), []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        sequence = decoder(model).start()
        prompt = sequence.append(IDS[:30], keep=30)
        found.append(torch.cat([prompt, sequence.append(IDS[30:31]), sequence.append(IDS[31:33], keep=2)]))
    torch.set_num_threads(before)
    assert_close(found[1], found[0])
    assert torch.equal(found[1], found[2])


def test_prepared_layers_and_int8_are_as_in_the_layers():
    model = tiny("qwen3_moe")
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare("cpu", torch.float32, "int8")
    assert fuse_experts(model) == {}
    got, truth = decoder(model).start().append(IDS, keep=100), eager(model)
    other = decoder(model, compute="float").start().append(IDS, keep=100)
    off, apart = ((logits - truth).square().mean().sqrt() for logits in (got, other))
    assert off < 0.3 * apart  # a code may flip, but they are not rounded another way


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_bits_and_halves(bits, dtype):
    """bf16: the decoder keeps fp32 between layers, so it is compared with the same weights in fp32."""
    model = tiny("mixtral", integer(bits, None)).to(dtype)
    found = decoder(model).start().append(IDS, keep=100)
    assert_close(found, eager(model.float()), TOLERANCE if dtype == torch.float32 else 2e-3)


def shared_dense(name):
    return None if "shared_expert" in name else integer(4, 32)


def one_wider(name):
    return integer(8 if "experts.2.up_proj" in name else 4, 32)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("mixtral", {"apart": False}, r"layers\.0\.mlp\.experts are not packed"),
        ("olmoe", {"clip_qkv": 3.0}, r"clips queries, keys and values to 3\.0"),
        ("qwen2_moe", {"grid": shared_dense}, r"shared_expert\.gate_proj is not packed"),
        ("mixtral", {"grid": one_wider}, r"experts: gate and up of all experts are stored in one way"),
        ("mixtral", {"hidden_act": "gelu"}, "uses GELUActivation, not SiLU"),
    ],
    ids=["stacked", "clipped", "shared", "mixed", "gelu"],
)
def test_what_does_not_run_is_refused_by_name(name, options, why):
    said = native(tiny(name, **options))
    assert isinstance(said, str)
    assert re.search(why, said), said


def test_other_bits_of_down_run():
    """Only gate and up share prepared inputs."""
    model = tiny("mixtral", lambda name: integer(8 if "experts.1.down" in name else 4, 32))
    assert_close(decoder(model).start().append(IDS, keep=100), eager(model))


def test_biases_of_experts_are_added():
    model = tiny("mixtral")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and ".experts." in name:
            bias = torch.randn(module.out_features, generator=torch.Generator().manual_seed(len(name)))
            module.bias = nn.Parameter(bias, requires_grad=False)
    assert_close(decoder(model).start().append(IDS, keep=100), eager(model))
