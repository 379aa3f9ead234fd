"""A checkpoint made again from its recorded inputs is the same, and what is not the same is named."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny_mixtures
import tiny_models
import torch
from safetensors.torch import load_file

import quantkit
from quantkit.checkpoint.manifest import read_facts, read_manifest, write_facts, write_manifest
from quantkit.checkpoint.records import FileRecord
from quantkit.checkpoint.shards import write_shard
from quantkit.cli.main import run
from quantkit.errors import DataError, ModelError, UserError

pytestmark = pytest.mark.usefixtures("steady")
BLOCK = "model-00002-of-00005.safetensors"
CODES = "model.layers.1.self_attn.q_proj.weight_packed"


@pytest.fixture(scope="module")
def made(arguments, tmp_path_factory):
    """made(recipe name, **changes) -> the folder of its checkpoint."""
    known = {}

    def make(name, **changes):
        key = name, str(changes)
        if key not in known:
            known[key] = tmp_path_factory.mktemp("made") / "out"
            quantkit.quantize(**arguments(name, known[key], **changes))
        return known[key]

    return make


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made("gptq"), tmp_path / "copy")


def altered(folder):
    """The folder with one code of block 1 changed, and a manifest that knows no better."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / BLOCK).items()}
    tensors[CODES][0, 0] ^= 1
    written = write_shard(folder / BLOCK, tensors)
    manifest = read_manifest(folder)
    record = FileRecord(written.sha256, written.nbytes, written.crc32)
    write_manifest(folder, replace(manifest, files=manifest.files | {BLOCK: record}))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        *("gptq with head", "awq"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("rtn", "gptq", "smoothquant", "smoothquant_plus", "static")
        ),
    ],
)
def test_every_part_made_alone_and_behind_stored_ones_is_the_same(made, name):
    folder = made(name)
    every = quantkit.reproduce(folder, layers="*")
    assert every.identical
    assert [part.name for part in every.parts] == [
        *(f"model.layers.{i}" for i in range(4)),
        "outside the blocks",
    ]
    assert all(part.found == part.recorded for part in every.parts)
    last = quantkit.reproduce(folder, layers="model.layers.3")
    assert [part.name for part in last.parts] == ["model.layers.3"]
    assert last.identical
    head = quantkit.reproduce(folder, layers="lm_head")
    assert [(part.name, part.differences) for part in head.parts] == [("outside the blocks", [])]


@pytest.mark.parametrize("cache", ["FP8", pytest.param("INT8", marks=pytest.mark.slow)])
def test_a_block_behind_a_rounded_cache_is_the_same(made, cache):
    found = quantkit.reproduce(made("gptq", kv_cache=cache), layers="*.3.self_attn.q_proj")
    assert (found.identical, len(found.parts)) == (True, 1)


@pytest.mark.parametrize("name", [pytest.param("mixtral", marks=pytest.mark.slow), "qwen2_moe"])
def test_a_block_behind_stored_experts_is_the_same(arguments, tmp_path, name):
    tiny_models.save(tiny_mixtures.build(name), tmp_path / "model", dtype=torch.bfloat16)
    experts = {"min_tokens": 200}  # so that experts are calibrated on tokens of others too
    rules = [{"match": "*.shared_expert.down_proj", "skip": True}] if name == "qwen2_moe" else []
    asked = arguments("awq", tmp_path / "out", model=tmp_path / "model", experts=experts, rules=rules)
    quantkit.quantize(**asked)
    found = quantkit.reproduce(tmp_path / "out", layers="model.layers.1")
    assert (found.identical, len(found.parts)) == (True, 1)


def test_blocks_are_chosen_evenly_and_without_a_model_class(made):
    found = quantkit.reproduce(made("rtn", model_free=True, calibration={}), layers=2)
    assert [(part.name, part.differences) for part in found.parts] == [
        ("model.layers.0", []),
        ("model.layers.3", []),
    ]
    found = quantkit.reproduce(made("rtn"), layers=3)
    assert [part.name for part in found.parts] == ["model.layers.0", "model.layers.2", "model.layers.3"]


def test_a_changed_code_is_counted(copied):
    found = quantkit.reproduce(altered(copied), layers="model.layers.1")
    assert not found.changed
    (part,) = found.parts
    assert [str(each) for each in part.differences] == [f"{CODES}: 1 of 4,096 codes differ"]


def test_later_blocks_are_made_behind_the_stored_ones(copied):
    altered(copied)
    assert not quantkit.reproduce(copied, layers="model.layers.2").identical
    assert quantkit.reproduce(copied, layers="model.layers.0").identical


def test_a_damaged_file_is_named_and_nothing_is_made(copied):
    content = bytearray((copied / BLOCK).read_bytes())
    content[-1] ^= 1
    (copied / BLOCK).write_bytes(content)
    (copied / "tokenizer_config.json").unlink()
    found = quantkit.reproduce(copied, layers=1)
    assert [name.split()[0] for name in found.changed] == sorted([BLOCK, "tokenizer_config.json"])
    assert any("model.layers.1." in name for name in found.changed)
    assert (found.identical, found.parts) == (False, [])


def test_another_source_or_text_is_not_the_recorded_one(copied, inputs, tmp_path):
    model = shutil.copytree(inputs / "model", tmp_path / "model")
    assert quantkit.reproduce(copied, layers=1, model=model).identical
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    text = tmp_path / "text"
    text.write_text((inputs / "text").read_text()[::-1])
    found = quantkit.reproduce(copied, layers=1, model=model, data=[text])
    assert [change.name for change in found.inputs] == ["model", "data"]
    assert (found.identical, found.parts) == (False, [])


def test_a_key_that_recipes_did_not_have_is_no_other_input(copied):
    manifest = read_manifest(copied)
    recipe = json.loads(json.dumps(manifest.identity["recipe"]))
    del recipe["weights"]["algorithm"]["retarget"]
    write_manifest(copied, replace(manifest, identity=manifest.identity | {"recipe": recipe}))
    found = quantkit.reproduce(copied, layers=1)
    (key,) = (each for each in found.environment if each.name.startswith("recipe: "))
    assert (key.name, key.then, key.now) == ("recipe: weights.algorithm.retarget", None, 1.0)
    assert (found.identical, found.inputs) == (True, [])
    recipe["weights"]["bits"] = 8
    write_manifest(copied, replace(manifest, identity=manifest.identity | {"recipe": recipe}))
    assert [str(each.name) for each in quantkit.reproduce(copied, layers=1).inputs] == [
        "recipe: weights.bits"
    ]


def test_statistics_of_other_text_are_another_input(copied):
    manifest = read_manifest(copied)
    for kept, known in (("kept", True), ("a b", False)):
        write_manifest(copied, replace(manifest, identity=manifest.identity | {"statistics": kept}))
        found = quantkit.reproduce(copied, layers=1)
        assert [(each.name, each.then, each.now) for each in found.inputs] == (
            [] if known else [("statistics", "a b", None)]
        )
        assert found.identical == known


def test_what_is_needed_is_asked_for(copied, inputs, tmp_path):
    with pytest.raises(ModelError, match=r"has no quantkit\.json"):
        quantkit.reproduce(inputs / "model")
    with pytest.raises(UserError, match="got 2; name each with --data"):
        quantkit.reproduce(copied, data=[inputs / "text"] * 2)
    with pytest.raises(UserError, match=r"no tensor .* fits 'layer\.7'"):
        quantkit.reproduce(copied, layers="layer.7")
    with pytest.raises(DataError, match="no file"):
        quantkit.reproduce(copied, data=[tmp_path / "gone.txt"])
    write_facts(copied, replace(read_facts(copied), inputs=None))
    with pytest.raises(UserError, match="name it with --model"):
        quantkit.reproduce(copied)


def test_the_command_says_what_differs(copied, tmp_path, capsys):
    write_facts(copied, replace(read_facts(copied), versions={"torch": "1.0"}))
    assert run(["verify", str(copied), "--layers", "1", "--json", str(tmp_path / "r.json")]) == 0
    shown = capsys.readouterr().out
    assert "identical: its" in shown
    assert "torch: 1.0 ->" in shown
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["schema"], report["identical"], report["blocks"]) == ("quantkit-verify/1", True, 4)
    assert run(["verify", str(altered(copied)), "--layers", "*.1.*"]) == 1
    assert f"first differing tensor: {CODES}: 1 of 4,096 codes differ" in capsys.readouterr().out
    assert run(["verify", str(tmp_path)]) == 2
