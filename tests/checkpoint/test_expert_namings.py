"""Experts on disk find their place in a model whose experts are linears of their own."""

from transformers.core_model_loading import WeightRenaming

from quantkit.checkpoint.plugin import _namings

RENAMED = [WeightRenaming(r"\.moe\.", ".mlp.")]


def loaded(name, experts):
    for each in [*RENAMED, *_namings(RENAMED, experts)]:
        name, _ = each.rename_source_key(name)
    return name


def test_experts_of_two_modules_share_a_list():
    experts = {
        "model.layers.0.mlp.text.experts.0": "layers.0.moe.experts.0",
        "model.layers.0.mlp.vision.experts.0": "layers.0.moe.experts.1",
    }
    found = loaded("layers.7.moe.experts.1.up_proj.weight_packed", experts)
    assert found == "layers.7.mlp.vision.experts.0.up_proj.weight_packed"
    assert loaded("layers.7.moe.gate.weight", experts) == "layers.7.mlp.gate.weight"


def test_what_transformers_renames_by_itself_is_left_to_it():
    assert not _namings(RENAMED, {"model.layers.0.mlp.experts.0": "layers.0.moe.experts.0"})
    assert len(_namings([], {"model.layers.0.mlp.experts.0": "layers.0.moe.experts.0"})) == 1
