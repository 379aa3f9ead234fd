"""A loaded model saved, pickled, copied and dequantized."""

import copy
import io
import json
import pickle
from dataclasses import replace

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

import quantkit
from quantkit.checkpoint.manifest import read_manifest
from quantkit.checkpoint.plugin import packed_linears

IDS = tiny_models.ids(9, batch=2)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A checkpoint that quantkit made of a bf16 model."""
    root = tmp_path_factory.mktemp("saving")
    model = tiny_models.save(tiny_models.build("llama-gqa"), root / "m", torch.bfloat16)
    recipe = {"weights": {"bits": 4, "group_size": 32, "symmetric": False, "algorithm": "rtn"}}
    quantkit.quantize(recipe, model, root / "o", evaluate=False)
    return root / "o"


def tensors_of(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_a_saved_model_is_the_same_checkpoint(output, tmp_path):
    quantkit.load(output, device="cpu").save_pretrained(tmp_path)
    before, after = tensors_of(output), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (output, tmp_path)]
    assert configs[0]["dtype"] == configs[1]["dtype"] == "bfloat16"
    old, new = read_manifest(output), read_manifest(tmp_path)
    assert old == replace(new, files=old.files)
    assert torch.equal(logits(quantkit.load(tmp_path, verify=True)), logits(quantkit.load(output)))


def test_tied_tensors_are_saved_once(tmp_path):
    model = tiny_models.build("llama-gqa", tie_word_embeddings=True)
    tiny_models.save(model, tmp_path / "m", torch.bfloat16)
    recipe = {"weights": {"bits": 4, "group_size": 32, "algorithm": "rtn"}}
    quantkit.quantize(recipe, tmp_path / "m", tmp_path / "o", evaluate=False)
    quantkit.load(tmp_path / "o", device="cpu").save_pretrained(tmp_path / "again")
    before, after = tensors_of(tmp_path / "o"), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    assert read_manifest(tmp_path / "again")


def test_a_changed_model_keeps_its_change_and_no_record(output, tmp_path):
    model = quantkit.load(output, device="cpu")
    with torch.no_grad():
        model.model.norm.weight[0] = 1.00001  # no bf16 number
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "quantkit.json").exists()
    assert float(quantkit.load(tmp_path).model.norm.weight.detach()[0]) == pytest.approx(1.00001, abs=1e-7)


def held(model):
    """Bytes of all memory that keeps the tensors of a model alive."""
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage() for t in [*model.parameters(), *model.buffers()]
    }
    return sum(storage.nbytes() for storage in storages.values())


def pickled(model):
    raw = pickle.dumps(model)
    return len(raw), pickle.loads(raw)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    size = file.tell()
    file.seek(0)
    return size, torch.load(file, weights_only=False)


def copied(model):
    twin = copy.deepcopy(model)
    return held(twin), twin


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("torch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("duplicate", [pickled, saved, copied])
def test_copies_hold_every_layer_once(wide_llamas, backend, duplicate):
    model = quantkit.load(wide_llamas[0], device="cpu", backend=backend)
    truth, footprint = logits(model), model.get_memory_footprint()
    size, twin = duplicate(model)
    assert size < 1.3 * footprint
    assert held(twin) < 1.3 * footprint
    assert torch.equal(logits(twin), truth)
    for _, layer in packed_linears(model)[:7]:
        assert duplicate(layer)[0] < 1.3 * sum(buffer.nbytes for buffer in layer.buffers()) + 10_000


@pytest.mark.parametrize("family", ["llama-bias", "gpt2", "falcon"])
def test_dequantize_gives_the_dense_model(family, tmp_path):
    model = tiny_models.save(tiny_models.build(family), tmp_path / "m", torch.bfloat16)
    recipe = {"weights": {"bits": 4, "group_size": 32, "algorithm": "rtn"}}
    quantkit.quantize(recipe, model, tmp_path / "o", evaluate=False)
    packed = quantkit.load(tmp_path / "o", device="cpu", backend="reference")
    truth = logits(packed)
    dense = packed.dequantize()
    assert packed_linears(dense) == []
    torch.testing.assert_close(logits(dense), truth, rtol=0, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    torch.testing.assert_close(logits(quantkit.load(tmp_path / "dense")), truth, rtol=0, atol=1e-5)


def test_half_is_refused_in_one_line(output):
    with pytest.raises(ValueError, match="not supported") as refused:
        quantkit.load(output, device="cpu").half()
    assert "\n" not in str(refused.value)
