"""The KV cache that `quantkit.load` gives a checkpoint."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.errors import ModelError
from quantkit.layers.kv_cache import attached
from quantkit.scheme import KV_PRESETS

FIXTURE = Path(__file__).parents[1] / "fixtures/kv-fp8-head"
IDS = torch.arange(3, 19)[None]


@pytest.fixture
def folder(tmp_path):
    copied = shutil.copytree(FIXTURE, tmp_path / "model")
    (copied / "logits.safetensors").unlink()
    return copied


def changed(folder, **new):
    """Tensors replaced, or removed by None, by the end of their names."""
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        leaf = name.rpartition(".")[2]
        if leaf in new and new[leaf] is None:
            del tensors[name]
        elif leaf in new:
            tensors[name] = torch.full_like(tensors[name], new[leaf])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder, **how):
    return quantkit.load(folder, device="cpu", **how)


def test_the_scheme_of_the_file_runs(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attached(load(folder)).scheme == KV_PRESETS["FP8"]
        assert attached(load(folder, kv_cache="fp8")).scheme == KV_PRESETS["FP8"]


def test_another_cache_is_said(folder):
    with pytest.warns(
        UserWarning, match=r"runs as exact, as asked for; the checkpoint was made for KV fp8_e4m3 head"
    ):
        exact = load(folder, kv_cache="exact")
    assert attached(exact) is None
    with pytest.warns(UserWarning, match="runs as KV int8 token"):
        other = load(folder, kv_cache="INT8")
    with torch.no_grad():
        assert not torch.equal(other(IDS).logits, exact(IDS).logits)


@pytest.mark.parametrize(
    ("new", "says"),
    [
        ({"k_scale": None}, r"scales of the KV cache are missing: model.layers.0.self_attn.k_scale"),
        ({"v_scale": 0.0}, r"a scale of 0 or below in .*v_scale"),
        ({"v_scale": -0.1}, r"a scale of 0 or below in .*v_scale"),
        ({"k_scale": float("nan")}, r"NaN or infinity in .*k_scale"),
        ({"k_scale": 1.0, "v_scale": 1.0}, r"all scales of the KV cache are 1.0 \(k_scale, v_scale\)"),
    ],
)
def test_scales_that_were_never_calibrated_are_refused_by_name(folder, new, says):
    with pytest.raises(ModelError, match=says):
        load(changed(folder, **new))


def test_what_cannot_be_asked_for(folder):
    with pytest.raises(ModelError, match="unknown KV cache 'int9'; known: exact, FP8"):
        load(folder, kv_cache="int9")
    with pytest.raises(ModelError, match=r"needs calibrated scales, which this checkpoint does not have"):
        load(folder, kv_cache="FP8_TENSOR")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["symmetric"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="kv_cache_scheme: fp8_e4m3"):
        load(folder)


def test_saved_again_it_is_the_same_checkpoint(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(IDS).logits, model(IDS).logits)
