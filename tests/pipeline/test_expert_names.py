"""What a checkpoint's config says of experts, read as vLLM reads it: under its own names, whatever the disk has."""

import re

import pytest
import tiny_mixtures
import tiny_models

from quantkit.formats.compressed_tensors_config import parsed_config, written_config
from quantkit.models.names import ignore_patterns
from quantkit.pipeline.ignored import ignore_list
from quantkit.pipeline.progress import Silent
from quantkit.pipeline.quantize import prepared

ASKED = ("gate_proj", "up_proj", "down_proj")  # of the first expert
# name -> (what holds the experts of a layer on disk, its router there)
FAMILIES = {
    "mixtral": ("block_sparse_moe.experts", "block_sparse_moe.gate"),
    "qwen3_moe": ("mlp.experts", "mlp.gate"),
    "deepseek_v3": ("mlp.experts", "mlp.gate"),
    "granitemoe": ("block_sparse_moe.experts", "block_sparse_moe.router.layer"),
}
CASES = {  # rules, and the bits of the experts of the last layer
    "alike": ([], 4),
    "another attention": ([{"match": "*self_attn*", "bits": 8}], 4),
    "another layer": ([{"match": "*.1.*experts.*", "bits": 8}], 8),
    "a layer skipped": ([{"match": "*.1.*experts.*", "skip": True}], None),
    "skipped": ([{"match": "*experts.*", "skip": True}], None),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, folder of a checkpoint)"""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, tiny_models.save(tiny_mixtures.build(request.param), folder)


def fits(entry, name):
    return re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name


def bits_in_vllm(config, name):
    """Of a linear or of experts, for which the class Linear stands too; None: not quantized."""
    if any(fits(entry, name) for entry in config["ignore"]):
        return None
    groups = config["config_groups"].values()
    found = [g for g in groups if any(t == "Linear" or fits(t, name) for t in g["targets"])]
    assert len(found) == 1, name
    return found[0]["weights"]["num_bits"]


@pytest.mark.parametrize("case", CASES)
def test_the_names_that_vllm_asks_for_have_the_scheme_of_the_file(case, family, tmp_path):
    name, source = family
    rules, bits = CASES[case]
    recipe = {"weights": {"bits": 4, "group_size": 16, "algorithm": "rtn"}, "rules": rules}
    run = prepared(recipe, source, tmp_path / "out", (), "cpu", None, Silent())
    schemes = {layer.name: layer.scheme for layer in run.plan.layers}
    config = written_config(schemes, ignore_list(run.model, schemes))
    experts, router = FAMILIES[name]
    holder = f"model.layers.1.{experts}"
    assert {bits_in_vllm(config, f"{holder}.0.{leaf}") for leaf in ASKED} == {bits}
    assert bits_in_vllm(config, f"model.layers.1.{router}") is None
    found = parsed_config(config)
    assert {linear: found(linear) for linear in schemes} == schemes
    entries = [*config["ignore"], *(t for g in config["config_groups"].values() for t in g["targets"])]
    for pattern in (entry[3:] for entry in entries if entry.startswith("re:")):
        assert pattern.endswith("$")  # and matched from the start
        assert not re.match(pattern, f"{holder}.0.gate_proj_norm")
        assert not re.match(pattern, "model.layers.0.mlp.shared_experts.gate_proj")


def test_a_run_without_a_model_class_leaves_what_vllm_asks_for_too():
    left = [f"model.layers.1.moe.experts.{e}.{leaf}" for e in (0, 1) for leaf in ("w1", "w2", "w3")]
    packed = [name.replace("layers.1", "layers.0") for name in left]
    packed += ["model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj"]
    patterns = ignore_patterns(left, packed, "model.layers", 2)
    config = {
        "ignore": patterns,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
    }
    for leaf in ASKED:
        assert bits_in_vllm(config, f"model.layers.1.moe.experts.0.{leaf}") is None
        assert bits_in_vllm(config, f"model.layers.0.moe.experts.0.{leaf}") == 4
    assert {bits_in_vllm(config, name) for name in packed} == {4}
