"""How two checkpoints differ is told key by key, layer by layer and code by code."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.manifest import read_manifest, write_manifest
from quantkit.cli.main import run

pytestmark = pytest.mark.usefixtures("steady")
FIXTURES = Path(__file__).parents[1] / "fixtures"
BLOCK = "model-00002-of-00005.safetensors"
CODES = "model.layers.1.self_attn.q_proj.weight_packed"


@pytest.fixture(scope="module")
def made(arguments, tmp_path_factory):
    """Two checkpoints of one model: every linear in 4 bits; down_proj in 8 bits of other groups."""
    folder = tmp_path_factory.mktemp("made")
    rules = [{"match": "*.down_proj", "bits": 8, "group_size": 64}]
    quantkit.quantize(**arguments("rtn", folder / "a"))
    quantkit.quantize(**arguments("rtn", folder / "b", rules=rules, transforms=[]))
    return folder / "a", folder / "b"


def test_a_copy_is_identical(made, tmp_path):
    found = quantkit.diff(made[0], shutil.copytree(made[0], tmp_path / "copy"))
    assert found.identical
    assert (found.recipe, found.differences, found.files) == ([], [], [])


def test_recipes_schemes_sizes_and_errors_are_paired(made):
    found = quantkit.diff(*made)
    assert {key.key: (key.one, key.other) for key in found.recipe} == {
        "rules.0.match": (None, "*.down_proj"),
        "rules.0.bits": (None, 8),
        "rules.0.group_size": (None, 64),
    }
    apart = [kind for kind in found.kinds if kind.schemes[0] != kind.schemes[1]]
    (kind,) = apart
    assert (kind.name, kind.count) == ("model.layers.*.mlp.down_proj", 4)
    assert kind.schemes == ("W4A16 g32 asym", "W8A16 g64 asym")
    assert kind.errors[0] > 50 * kind.errors[1] > 0
    assert kind.bytes[1] - kind.bytes[0] == found.other.bytes - found.one.bytes
    named = {each.tensor.rpartition(".")[0].rpartition(".")[2] for each in found.differences}
    assert named == {"down_proj"}
    assert found.files == ["config.json: differs"]
    assert found.one.made
    assert found.other.made


def test_statistics_of_other_text_are_told(made, tmp_path):
    copy = shutil.copytree(made[0], tmp_path / "copy")
    manifest = read_manifest(copy)
    write_manifest(copy, replace(manifest, identity=manifest.identity | {"statistics": "a b"}))
    (key,) = quantkit.diff(made[0], copy).recipe
    assert (key.key, key.one, key.other) == ("statistics of the original model", None, "a b")


def test_other_codes_of_one_scheme_are_counted(made, tmp_path):
    copy = shutil.copytree(made[0], tmp_path / "copy")
    tensors = {name: tensor.clone() for name, tensor in load_file(copy / BLOCK).items()}
    tensors[CODES][0, 0] ^= 0b1001_0001  # two codes of 4 bits
    tensors["model.layers.1.input_layernorm.weight"][3] += 1
    save_file(tensors, copy / BLOCK, {"format": "pt"})
    (copy / "quantkit.json").unlink()
    (copy / "note.txt").write_text("new")
    found = quantkit.diff(made[0], copy)
    assert [str(each) for each in found.differences] == [
        "model.layers.1.input_layernorm.weight: 1 of 64 values differ",
        f"{CODES}: 2 of 4,096 codes differ",
    ]
    assert found.files == ["note.txt: only in the second"]
    assert found.recipe is None


def test_a_plain_model_and_its_quantized_one(made, inputs):
    found = quantkit.diff(inputs / "model", made[0])
    assert (found.one.format, found.one.made, found.other.format) == (None, False, "pack-quantized")
    by_name = {kind.name: kind.schemes for kind in found.kinds}
    assert by_name["model.layers.*.mlp.up_proj"] == ("BF16", "W4A16 g32 asym")
    assert by_name["model.embed_tokens"] == ("BF16", "BF16")
    assert {each.why for each in found.differences} == {"only in the first", "only in the second"}


def test_checkpoints_of_other_tools(tmp_path):
    found = quantkit.diff(FIXTURES / "gptq4-sym", FIXTURES / "awq4-gemm")
    assert (found.one.format, found.other.format, found.recipe) == ("gptq", "awq", None)
    copy = shutil.copytree(FIXTURES / "gptq4-sym", tmp_path / "copy")
    file = copy / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = next(each for each in tensors if each.endswith("q_proj.qweight"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, file, {"format": "pt"})
    (only,) = quantkit.diff(FIXTURES / "gptq4-sym", copy).differences
    assert (only.tensor, only.why, only.differing) == (name, "codes", 1)


def test_the_command_has_the_kl_and_the_exit_code(made, inputs, tmp_path, capsys):
    one, other = map(str, made)
    asked = [
        "--kl",
        "--text",
        str(inputs / "text"),
        "--max-tokens",
        "512",
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert run(["diff", one, other, *asked]) == 0
    shown = capsys.readouterr().out
    assert "rules.0.bits: - -> 8" in shown
    assert "4 model.layers.*.mlp.down_proj" in shown
    assert "KL(A || B), mean" in shown
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["schema"], report["identical"]) == ("quantkit-diff/1", False)
    assert report["evaluation"]["kl_mean"] > 0
    assert report["evaluation"]["kl_mean_se"] is not None
    assert run(["diff", one, other, "--exit-code"]) == 1
    assert run(["diff", one, one, "--exit-code"]) == 0
    assert "identical" in capsys.readouterr().out
    assert run(["diff", one, str(tmp_path)]) == 2
    assert run(["diff", one, other, "--text", "x"]) == 2
