"""Weights that are no integers, from a recipe to the loaded model, and the scales that siblings have in common."""

import pytest
import tiny_models
import torch
from quantkit_kernels.cpu import library
from safetensors.torch import load_file

import quantkit
from quantkit.checkpoint.plugin import packed_linears
from quantkit.errors import QuantkitError

NATIVE = "cpu" if library.available() else "auto"
GPTQ = {"name": "gptq", "refine": 1}
FORMATS = [("W8A16_FP8", "rtn"), ("FP8_BLOCK", GPTQ), ("NVFP4A16", GPTQ), ("MXFP4A16", "rtn")]


def stored(folder):
    return {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}


def quantized(inputs, folder, preset, algorithm):
    recipe = {"weights": {"preset": preset, "algorithm": algorithm}, "inputs": "none"}
    recipe["calibration"] = {"data": [str(inputs / "text")], "samples": 4, "sequence_length": 32}
    quantkit.quantize(recipe, inputs / "model", folder, evaluate=False)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """One block, whose k and v have 64 rows: less than a block of 128, so that siblings do not align."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_models.FAMILIES["llama-gqa"](
        hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=1
    )
    tiny_models.save(model, folder / "model", dtype=torch.bfloat16)
    (folder / "text").write_text("In the beginning there was a number, and it was rounded. " * 60)
    return folder


@pytest.mark.parametrize(("preset", "algorithm"), FORMATS, ids=[preset for preset, _ in FORMATS])
def test_from_recipe_to_loaded_model(inputs, tmp_path, preset, algorithm):
    folder = quantized(inputs, tmp_path / "out", preset, algorithm)
    ids = tiny_models.ids(9)
    with torch.no_grad():
        own = quantkit.load(folder, device="cpu", backend=NATIVE)
        plain = quantkit.load(folder, device="cpu", backend="reference")
        off = (own(ids).logits - plain(ids).logits).square().mean() / plain(ids).logits.square().mean()
    assert float(off) < 1e-4
    assert len(packed_linears(own)) == 7
    own.save_pretrained(tmp_path / "again")
    before, after = stored(folder), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


@pytest.mark.parametrize(
    ("preset", "leaf", "algorithm"),
    [
        ("FP8", "weight_scale", "rtn"),
        ("NVFP4A16", "weight_global_scale", "rtn"),
        ("NVFP4A16", "weight_global_scale", GPTQ),
    ],
    ids=["FP8", "NVFP4", "NVFP4-gptq"],
)
def test_siblings_that_engines_fuse_share_what_a_weight_has_once(inputs, tmp_path, preset, leaf, algorithm):
    """With and without calibration; others have their own."""
    tensors = stored(quantized(inputs, tmp_path / "out", preset, algorithm))
    scales = {name: float(t) for name, t in tensors.items() if name.endswith(f".{leaf}")}

    def of(*names):
        return {scales[f"model.layers.0.{name}.{leaf}"] for name in names}

    qkv = of(*(f"self_attn.{n}_proj" for n in "qkv"))
    mlp = of("mlp.gate_proj", "mlp.up_proj")
    assert len(qkv) == len(mlp) == 1
    assert len(qkv | mlp | of("self_attn.o_proj") | of("mlp.down_proj")) == 4


def test_nf4_has_no_file_format(inputs, tmp_path):
    with pytest.raises(QuantkitError, match="no format for W4A16 nf4"):
        quantized(inputs, tmp_path / "out", "NF4", "rtn")
