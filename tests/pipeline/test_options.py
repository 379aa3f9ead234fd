"""Every option of the algorithms runs end to end and gives a model that is close to the original."""

import pytest
import tiny_models
import torch

import quantkit
from quantkit.checkpoint.manifest import read_manifest

pytestmark = pytest.mark.usefixtures("steady")

OPTIONS = {
    "rtn minmax": {"algorithm": {"name": "rtn", "range": "minmax"}},
    "rtn weighted": {"algorithm": {"name": "rtn", "range": "weighted"}},
    "rtn refit": {"algorithm": {"name": "rtn", "range": "minmax", "refit": 3}},
    "rtn weighted refit": {"algorithm": {"name": "rtn", "range": "weighted", "refit": 3}},
    "gptq": {"algorithm": "gptq"},
    "gptq weighted": {"algorithm": {"name": "gptq", "range": "weighted"}},
    "gptq one pass": {"algorithm": {"name": "gptq", "true_sequential": False}},
    "gptq dynamic groups": {"algorithm": {"name": "gptq", "order": "none", "groups": "dynamic"}},
    "gptq group aware": {"algorithm": {"name": "gptq", "order": "group_aware", "refine": 0}},
    "gptq half re-target": {"algorithm": {"name": "gptq", "retarget": 0.5}},
    "gptq channel": {"algorithm": "gptq", "group_size": "channel"},
    "gptq small groups": {"algorithm": "gptq", "group_size": 16},
}


@pytest.fixture(scope="module")
def original(inputs):
    return quantkit.load(inputs / "model", device="cpu")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_option_gives_a_close_model(name, symmetric, inputs, original, tmp_path):
    weights = {"bits": 8, "group_size": 32, "symmetric": symmetric} | OPTIONS[name]
    calibration = {"data": [str(inputs / "text")], "samples": 6, "sequence_length": 40}
    quantkit.quantize(
        {"weights": weights, "calibration": calibration},
        model=inputs / "model",
        output=tmp_path / "out",
        evaluate=False,
        device="cpu",
    )
    ids = tiny_models.ids(24, 2)
    with torch.no_grad():
        wanted = original(ids).logits
        found = quantkit.load(tmp_path / "out", device="cpu")(ids).logits
    off = (found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert 0 < off < 0.1, f"{name}: {off:.3g}"
    layers = read_manifest(tmp_path / "out").layers
    assert len(layers) == 28
    assert all(0 < layer.weight_error < 0.05 for layer in layers)


def test_what_awq_leaves_out_is_in_the_report(inputs, tmp_path):
    """Without v_proj in the plan neither its own input nor o_proj's can be scaled."""
    calibration = {"data": [str(inputs / "text")], "samples": 6, "sequence_length": 40}
    manifest = quantkit.quantize(
        {
            "weights": {"bits": 4, "group_size": 32, "algorithm": "rtn"},
            "transforms": [{"name": "awq", "grid": 2}],
            "rules": [{"match": "*.v_proj", "skip": True}],
            "output": {"allow_split_fusion": True},
            "calibration": calibration,
        },
        model=inputs / "model",
        output=tmp_path / "out",
        evaluate=False,
        device="cpu",
    ).manifest
    left = {tuple(s["consumers"]): s["left_out"] for s in manifest.scaling if "left_out" in s}
    attention = "self_attn"
    assert set(left) == {
        tuple(f"{attention}.{n}_proj" for n in "qkv"),
        (f"{attention}.o_proj",),
    }
    assert all(why.startswith(f"{attention}.v_proj would change") for why in left.values())
    assert f"awq left the input of {attention}.o_proj as it is in 4 blocks" in " ".join(manifest.notes)


def test_rules_choose_per_layer(inputs, tmp_path):
    rules = [
        {"match": "*.down_proj", "bits": 8, "algorithm": "rtn"},
        {"match": "model.layers.1.*", "skip": True},
    ]
    quantkit.quantize(
        {"weights": {"preset": "W4A16", "group_size": 32, "algorithm": "rtn"}, "rules": rules},
        model=inputs / "model",
        output=tmp_path / "out",
        evaluate=False,
        device="cpu",
    )
    schemes = {layer.name: layer.scheme for layer in read_manifest(tmp_path / "out").layers}
    assert not any(name.startswith("model.layers.1.") for name in schemes)
    assert schemes["model.layers.0.mlp.down_proj"] == "W8A16 g32 sym"
    assert schemes["model.layers.0.mlp.up_proj"] == "W4A16 g32 sym"
    model = quantkit.load(tmp_path / "out", device="cpu")
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
