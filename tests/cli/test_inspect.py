import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from manifests import EMPTY
from safetensors.torch import save_file

from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.checkpoint.manifest import write_manifest
from quantkit.checkpoint.records import FileRecord, LayerRecord
from quantkit.cli.inspect import _table, kinds
from quantkit.cli.main import run
from quantkit.errors import ModelError
from quantkit.formats.registry import codec
from quantkit.numerics.weight import QuantizedWeight
from quantkit.preflight.target import parse_target
from quantkit.scheme import Scheme, integer

FIXTURES = Path(__file__).parents[1] / "fixtures"


def packed_folder(folder, schemes, model_type="llama"):
    """One packed [64, 64] linear per scheme, a 2-D head and a norm."""
    tensors = {
        "lm_head.weight": torch.zeros(8, 64, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(64),
    }
    layers = {f"model.layers.{i}.mlp.c_fc": scheme for i, scheme in enumerate(schemes)}
    for name, scheme in layers.items():
        groups = 64 // scheme.weights.group(64)
        weight = QuantizedWeight(
            torch.randint(0, scheme.weights.qmax + 1, (64, 64), dtype=torch.uint8),
            torch.linspace(0.5, 2.0, 64 * groups).view(64, groups).bfloat16(),
            None if scheme.weights.symmetric else torch.ones(64, groups, dtype=torch.uint8),
            scheme.weights,
        )
        tensors |= {f"{name}.{part}": tensor for part, tensor in codec().pack(weight).items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": model_type, "quantization_config": codec().config(layers, ["lm_head"])}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loads(report):
    return {loader["name"]: loader["loads"] for loader in report["loaders"]}


def test_layers_and_totals_count_stored_bytes(tmp_path):
    folder = packed_folder(tmp_path / "m", [Scheme(integer(4, 32, True)), Scheme(integer(3, 32, False))])
    weights = {"model.safetensors": FileRecord("", (folder / "model.safetensors").stat().st_size)}
    layers = [LayerRecord("model.layers.1.mlp.c_fc", weight_error=0.01)]
    write_manifest(folder, replace(EMPTY, files=weights, layers=layers))
    report = inspect_checkpoint(folder)
    layers = {layer["name"]: layer for layer in report["layers"]}
    first, second = layers["model.layers.0.mlp.c_fc"], layers["model.layers.1.mlp.c_fc"]
    assert (first["scheme"], first["bits"], first["group_size"], first["error"]) == (
        "W4A16 g32 sym",
        4,
        32,
        None,
    )
    assert first["bytes"] == 64 * 64 // 2 + 64 * 2 * 2 + 16
    assert second["bytes"] == 64 * 24 + 64 * 2 * 2 + 16 + 6 * 2 * 4
    assert first["scale_range"] == [0.5, 2.0]
    assert second["error"] == 0.01
    assert layers["lm_head"]["scheme"] is None
    totals = report["totals"]
    assert totals["quantized_bytes"] == first["bytes"] + second["bytes"]
    assert totals["bytes"] == totals["quantized_bytes"] + 8 * 64 * 2 + 64 * 4
    assert totals["linear_bits_per_weight"] == 8 * totals["quantized_bytes"] / (2 * 64 * 64)


@pytest.mark.parametrize(
    ("scheme", "model_type", "plain", "vllm"),
    [
        (Scheme(integer(4, 32, True)), "llama", True, True),
        (Scheme(integer(3, 32, True)), "llama", True, True),
        (Scheme(integer(4, 32, True)), "gpt2", False, False),
    ],
)
def test_who_can_load(tmp_path, scheme, model_type, plain, vllm):
    report = inspect_checkpoint(packed_folder(tmp_path / "m", [scheme], model_type))
    assert loads(report) == {"quantkit": True, "transformers + compressed-tensors": plain, "vLLM": vllm}


@pytest.mark.parametrize(("model_type", "symmetric"), [("llama", False), ("falcon", True)])
def test_asymmetric_and_falcon_need_dequantize(tmp_path, model_type, symmetric):
    report = inspect_checkpoint(
        packed_folder(tmp_path / "m", [Scheme(integer(4, 32, symmetric))], model_type)
    )
    assert "dequantize=True" in report["loaders"][1]["how"]


def test_verb_prints_the_layers(tmp_path, capsys):
    folder = packed_folder(tmp_path / "m", [Scheme(integer(8, None, True))])
    assert run(["inspect", str(folder), "--device", "cpu", "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "W8A16 channel sym" in told
    assert "yes  vLLM" in told
    assert "bfloat16 on cpu" in told


def test_other_methods_and_lost_tensors_are_refused(tmp_path):
    folder = packed_folder(tmp_path / "m", [Scheme(integer(4, 32, True))])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["model.layers.0.mlp.c_fc"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="c_fc is packed"):
        inspect_checkpoint(folder)
    config["quantization_config"]["quant_method"] = "gptq"
    (folder / "config.json").write_text(json.dumps(config))
    assert run(["inspect", str(folder)]) == 2
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not valid JSON"):
        inspect_checkpoint(folder)


def layer(name, error):
    """One layer of a `quantkit-inspect/1` report."""
    facts = {
        "shape": [64, 64],
        "scheme": "W4A16 g32",
        "dtype": "int32",
        "bits_per_weight": 4.5,
        "bytes": 2304,
    }
    return facts | {"name": name, "scale_range": [0.5, 2.0], "error": error}


def test_eighty_layers_share_a_line_per_kind_with_the_range_of_their_errors():
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layers = [layer(f"model.layers.{i}.{leaf}", 0.01 * (i + 1)) for i in range(80) for leaf in leaves]
    groups = kinds(layers)
    assert [len(group) for group in groups] == [80] * 7
    table = _table("m", groups)
    assert table.row_count == 7
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["layer"][0] == "model.layers.{0..79}.q_proj"
    assert columns["weight error"][0] == "1.00e-02 .. 8.00e-01"
    assert _table("m", [[each] for each in layers]).row_count == 560


def test_all_gives_every_layer_a_line(tmp_path, capsys):
    folder = packed_folder(tmp_path / "m", [Scheme(integer(4, 32, True))] * 3)
    for options, shown in (([], 0), (["--all"], 1)):
        assert run(["inspect", str(folder), "--device", "cpu", *options]) == 0
        assert capsys.readouterr().out.count("layers.1.") == shown


@pytest.mark.parametrize(
    ("name", "target", "rules"),
    [
        ("mixed-w4-w8", "vllm,gpu=sm80", set()),
        ("mixed-w4-w8", "vllm,gpu=cpu", {"kernel"}),
        ("mixed-w4-w8", "vllm,gpu=sm80,tensor_parallel=4", {"groups"}),
        ("w8a8-int8-static-asym", "vllm,gpu=cpu-avx2", set()),
        ("model-free-fp8-dynamic", "vllm,gpu=sm90", set()),
        ("fp8-block", "vllm,gpu=sm90", {"blocks"}),
        ("kv-int8-tensor", "vllm,gpu=sm90", {"cache"}),
        ("kv-fp8-head", "vllm,gpu=sm90", set()),
        ("w4a8-int8", "vllm,gpu=sm90", {"kernel"}),
    ],
)
def test_checkpoints_of_other_tools_are_asked_the_same(name, target, rules):
    found = inspect_checkpoint(FIXTURES / name, target=parse_target(target))["target"]
    assert {finding["rule"] for finding in found["findings"]} == rules


def test_a_target_is_checked_and_refused_with_exit_code_2(tmp_path, capsys):
    folder = packed_folder(tmp_path / "m", [Scheme(integer(3, 32, True))])
    assert run(["inspect", str(folder), "--target", "engine=vllm,gpu=sm90"]) == 0
    assert "nothing is known that vLLM on sm90 would refuse" in capsys.readouterr().out
    report = tmp_path / "report.json"
    assert run(["inspect", str(folder), "--target", "vllm,gpu=cpu", "--json", str(report)]) == 2
    said = capsys.readouterr().err
    assert "model.layers.*.mlp.c_fc (1): W3A16 g32 sym has no kernel in vLLM on cpu; use gpu: sm75" in said
    (finding,) = json.loads(report.read_text())["target"]["findings"]
    assert finding["rule"] == "kernel"
    assert finding["source"].startswith("vLLM 0.32.0, model_executor/")
    assert run(["inspect", str(folder), "--target", "vllm,gpu=h100"]) == 2
    assert "gpu must be one of" in capsys.readouterr().err
