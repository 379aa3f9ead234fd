"""bitsandbytes' files against a decoder written from their definition: int8, and NF4 with quantized scales."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import quantkit
from quantkit.errors import ModelError
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source

FIXTURE = Path(__file__).parents[1] / "fixtures/bnb-nf4"
IDS = torch.arange(24)[None]
STATE = "quant_state.bitsandbytes__nf4"


def linears(tensors):
    return sorted(name.removesuffix(".weight.absmax") for name in tensors if name.endswith(".absmax"))


def saved(folder, tensors, **quantization):
    config = json.loads((FIXTURE / "config.json").read_text())
    config["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def by_definition(tensors):
    """Dense weights, fp32. int8: w SCB / 127. NF4: the first of two codes in the high half; scales of 64 codes in a
    run, which are themselves a table's values times one fp32 number for 256 of them, plus an offset."""
    dense = {}
    for name in sorted(
        {each.split(".weight")[0].removesuffix(".SCB") for each in tensors if "_proj" in each}
    ):
        weight = tensors[f"{name}.weight"]
        if f"{name}.SCB" in tensors:
            dense[f"{name}.weight"] = weight.float() * tensors[f"{name}.SCB"][:, None] / 127
            continue
        state = json.loads(bytes(tensors[f"{name}.weight.{STATE}"].tolist()))
        flat = [nibble for byte in weight.flatten().tolist() for nibble in (byte // 16, byte % 16)]
        scale = tensors[f"{name}.weight.absmax"]
        if scale.dtype == torch.uint8:
            whole, values = (tensors[f"{name}.weight.nested_{leaf}"] for leaf in ("absmax", "quant_map"))
            scale = torch.stack([values[code] * whole[i // 256] for i, code in enumerate(scale.tolist())])
            scale = scale + state["nested_offset"]
        levels = tensors[f"{name}.weight.quant_map"][torch.tensor(flat)]
        dense[f"{name}.weight"] = (levels.view(-1, state["blocksize"]) * scale[:, None]).view(state["shape"])
    return dense


def in_int8():
    """The fixture's weights as LLM.int8() stores them: the largest of a row is 127."""
    tensors = load_file(FIXTURE / "model.safetensors")
    others = {name: t for name, t in tensors.items() if ".weight." not in name and "_proj" not in name}
    for name, dense in by_definition(tensors).items():
        largest = dense.abs().amax(1)
        others[name] = (dense / largest[:, None] * 127).round().to(torch.int8)
        others[name.replace(".weight", ".SCB")] = largest
        others[name.replace(".weight", ".weight_format")] = torch.tensor(0, dtype=torch.uint8)
    return others


def twice_quantized():
    """The fixture with its scales quantized to 8 bits, by a random table."""
    tensors, generator = load_file(FIXTURE / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in linears(tensors):
        count = tensors[f"{name}.weight.absmax"].numel()
        tensors[f"{name}.weight.absmax"] = torch.randint(0, 256, (count,), generator=generator).byte()
        tensors[f"{name}.weight.nested_absmax"] = torch.rand(-(-count // 256), generator=generator) * 0.1
        tensors[f"{name}.weight.nested_quant_map"] = torch.rand(256, generator=generator)
        state = json.loads(bytes(tensors[f"{name}.weight.{STATE}"].tolist()))
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03}
        tensors[f"{name}.weight.{STATE}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


KINDS = {
    "int8": (in_int8, {"load_in_8bit": True, "load_in_4bit": False}, "W8A16 channel sym"),
    "nf4 with quantized scales": (twice_quantized, {"bnb_4bit_use_double_quant": True}, "W4A16 nf4 g64"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_logits_are_those_of_the_definition(kind, tmp_path):
    make, settings, _ = KINDS[kind]
    tensors = make()
    folder = saved(tmp_path, tensors, **settings)
    dense = by_definition(tensors)
    assert len(dense) == 14
    checkpoint = Source(read_checkpoint(folder))
    for name, wanted in dense.items():
        assert checkpoint.raw(name).shape == wanted.shape
        torch.testing.assert_close(checkpoint.tensor(name, torch.float32), wanted, rtol=1e-6, atol=1e-8)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    plain.load_state_dict(dense | {name: t.float() for name, t in tensors.items() if "_proj" not in name})
    with torch.no_grad():
        wanted, found = plain(IDS).logits, quantkit.load(folder, device="cpu")(IDS).logits
    assert (found - wanted).square().mean().sqrt() < 1e-4 * wanted.square().mean().sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_quantized_anew_with_its_errors_against_the_decoded_weights(kind, tmp_path):
    make, settings, said = KINDS[kind]
    tensors = make()
    (tmp_path / "in").mkdir()
    recipe = {"weights": {"algorithm": "rtn", "group_size": 32}, "model_free": True}
    folder = saved(tmp_path / "in", tensors, **settings)
    result = quantkit.quantize(recipe, model=folder, output=tmp_path / "out", evaluate=False)
    assert any(f"source: bitsandbytes, {said} (14 weights)" in note for note in result.manifest.notes)
    model, dense = (
        quantkit.load(tmp_path / "out", device="cpu").dequantize(torch.float32),
        by_definition(tensors),
    )
    for layer in result.manifest.layers:
        wanted = dense[f"{layer.name}.weight"].bfloat16().float()
        off = model.get_submodule(layer.name).weight - wanted
        error = float(off.square().sum() / wanted.square().sum())
        assert layer.weight_error == pytest.approx(error, rel=1e-3)


WRONG = [
    (b"{}", "its quant_state is not what bitsandbytes writes"),
    (b'{"quant_type": "nf4", "blocksize": 64, "shape": [64, 65]}', "does not fit its weight"),
    (b'{"quant_type": "nf4", "blocksize": 256, "shape": [32, 64]}', "blocks of 256 go over the ends"),
    (b" " * 70000, "quant_state.bitsandbytes__nf4 is U8"),
]


@pytest.mark.parametrize(("state", "says"), WRONG, ids=[str(n) for n in range(len(WRONG))])
def test_a_state_that_is_none_is_refused_by_the_linear(state, says, tmp_path):
    tensors = load_file(FIXTURE / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    tensors[f"{name}.weight.{STATE}"] = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises(ModelError, match=rf"{name}.*{says}"):
        read_checkpoint(saved(tmp_path, tensors))
