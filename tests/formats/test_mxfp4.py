"""MXFP4 experts of gpt-oss are decoded as transformers decodes them."""

import json

import pytest
import tiny_mixtures
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import quantkit
from quantkit.algorithms.rtn import rtn
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.errors import ModelError
from quantkit.layers.quant_linear import QuantLinear
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.scheme import integer

NAMES = [f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 1) for leaf in ("down_proj", "gate_up_proj")]


@pytest.fixture
def folder(tmp_path):
    """A tiny gpt-oss whose experts are stored as blocks and scales."""
    path = tiny_models.save(tiny_mixtures.build("gpt_oss"), tmp_path / "model", dtype=torch.bfloat16)
    tensors, generator = load_file(path / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in NAMES:
        experts, k, n = tensors.pop(name).shape
        shape = (experts, n, k // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).byte()
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, generator=generator).byte()
    change(path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return path


def change(path, tensors, quantization=None):
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if quantization is not None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def test_stacks_are_decoded_as_by_transformers_whole_and_one_expert_at_a_time(folder):
    stored = load_file(folder / "model.safetensors")
    source = Source(read_checkpoint(folder, model_free=True))
    assert set(NAMES) <= set(source.names())
    assert not any(name.endswith(("_blocks", "_scales")) for name in source.names())
    for name in NAMES:
        wanted = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert source.raw(name).shape == wanted.shape  # [E, K, N], as a checkpoint in bf16 has it
        assert torch.equal(source.tensor(name), wanted)
        for expert in range(len(wanted)):
            assert torch.equal(source.part(name, expert, torch.float32), wanted[expert].float())
    router = "model.layers.0.mlp.router.weight"
    assert torch.equal(source.part(router, 2), stored[router][2])


def test_a_run_without_a_model_class_writes_decoded_experts(folder, tmp_path):
    recipe = {"weights": {"preset": "FP8_DYNAMIC", "algorithm": "rtn"}, "model_free": True}
    result = quantkit.quantize(recipe, model=folder, output=tmp_path / "out", evaluate=False)
    assert any("source: mxfp4, W4A16 fp4_e2m1 g32 (4 weights)" in note for note in result.manifest.notes)
    source, written = Source(read_checkpoint(folder, model_free=True)), {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    for name in NAMES:
        assert torch.equal(written[name], source.tensor(name))
        assert result.manifest.tensors[f"{name}_blocks"].how == "decoded"
    assert written["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn


def test_experts_are_quantized_one_by_one_from_their_decoded_weights(folder, tmp_path):
    """Columns of gate and up alternate, and what an expert multiplies by from the right is the linear, transposed."""
    recipe = {
        "weights": {"algorithm": {"name": "rtn", "range": "minmax"}, "group_size": 32},
        "rules": [{"match": "model.layers.1.mlp.experts.*", "skip": True}],
    }
    result = quantkit.quantize(recipe, model=folder, output=tmp_path / "out", evaluate=False)
    stored, errors = load_file(folder / "model.safetensors"), {}
    both, down = (
        convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"]).float()
        for name in (NAMES[1], NAMES[0])
    )
    for expert in range(len(both)):
        parts = {
            "gate_proj": both[expert][:, 0::2],
            "up_proj": both[expert][:, 1::2],
            "down_proj": down[expert],
        }
        for leaf, part in parts.items():
            weight = part.T.contiguous()
            outcome = rtn(weight, integer(4, 32), torch.bfloat16)
            errors[f"model.layers.0.mlp.experts.{expert}.{leaf}"] = outcome.relative_error(weight)
    found = {layer.name: layer.weight_error for layer in result.manifest.layers if ".experts." in layer.name}
    assert found == pytest.approx(errors, rel=1e-4)
    tensors = result.manifest.tensors
    assert tensors[f"{NAMES[1]}_blocks"].how == "quantized"
    assert tensors[f"{NAMES[3]}_scales"].how == "decoded"
    assert tensors[f"{NAMES[3]}_scales"].became == [NAMES[3]]
    written = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    wanted = convert_moe_packed_tensors(stored[f"{NAMES[3]}_blocks"], stored[f"{NAMES[3]}_scales"])
    assert torch.equal(written[NAMES[3]], wanted)


def test_what_is_no_such_stack_is_refused_by_its_name(folder):
    stored = load_file(folder / "model.safetensors")
    change(folder, stored | {f"{NAMES[1]}_scales": stored[f"{NAMES[1]}_scales"][:1].contiguous()})
    with pytest.raises(ModelError, match=rf"{NAMES[1]} is stored as .*; MXFP4 experts have blocks"):
        read_checkpoint(folder, model_free=True)
    change(folder, {name: t for name, t in stored.items() if name != f"{NAMES[0]}_blocks"})
    with pytest.raises(ModelError, match=rf"{NAMES[0]} is stored as"):
        read_checkpoint(folder, model_free=True)
    stored[f"{NAMES[0]}_scales"][1, 0, 0] = 255
    change(folder, stored)
    with pytest.raises(ModelError, match=f"{NAMES[0]} holds NaN"):
        Source(read_checkpoint(folder, model_free=True)).tensor(NAMES[0])


def test_it_is_loaded_with_every_expert_on_its_own_packed_linears(folder, tmp_path):
    model = quantkit.load(folder, device="cpu")
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert {str(m.scheme) for m in packed} == {"W4A16 fp4_e2m1 g32"}
    assert len(packed) == 2 * tiny_mixtures.EXPERTS * 3
    tensors = load_file(folder / "model.safetensors")
    for name in NAMES:
        blocks, scales = tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales")
        tensors[name] = convert_moe_packed_tensors(blocks, scales)
    (tmp_path / "dense").mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "dense/config.json").write_text(json.dumps(config))
    change(tmp_path / "dense", tensors)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    tiny_mixtures.eager(plain)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found, wanted = model(ids).logits, plain(ids).logits
    assert (found - wanted).square().mean().sqrt() < 1e-4 * wanted.square().mean().sqrt()
    report = inspect_checkpoint(folder)
    assert report["made_by"] == "MXFP4 of transformers"
    assert {row["scheme"] for row in report["layers"] if ".experts." in row["name"] and row["scheme"]} == {
        "W4A16 fp4_e2m1 g32"
    }
