"""What is looked at before a checkpoint is used: sizes and values always, digests on request."""

import json
from dataclasses import replace

import pytest
import torch
from manifests import EMPTY
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.check import digest_file
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.checkpoint.manifest import MANIFEST, write_manifest
from quantkit.checkpoint.records import FileRecord
from quantkit.errors import ModelError
from quantkit.scheme import Scheme, integer

SHARD = "model.safetensors"
LINEAR = "model.layers.0.mlp.up_proj"


def record(folder):
    """Write a manifest of what lies in the folder now."""
    import zlib

    tensors = load_file(folder / SHARD)
    sums = {n: f"{zlib.crc32(t.contiguous().view(torch.uint8).numpy()):08x}" for n, t in tensors.items()}
    files = {
        name: FileRecord(digest_file(folder / name), (folder / name).stat().st_size, tensors)
        for name, tensors in (("config.json", None), (SHARD, sums))
    }
    write_manifest(folder, replace(EMPTY, files=files))


@pytest.fixture
def folder(packed_llama):
    folder, _ = packed_llama(Scheme(integer(4, 32)))
    record(folder)
    return folder


def change(folder, name, value):
    tensors = load_file(folder / SHARD)
    tensors[name] = value(tensors[name])
    save_file(tensors, folder / SHARD, {"format": "pt"})


def poisoned(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


@pytest.mark.parametrize(
    "name", [f"{LINEAR}.weight_scale", "model.norm.weight", "model.layers.1.input_layernorm.weight"]
)
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("use", [quantkit.load, inspect_checkpoint])
def test_scales_and_norms_that_are_no_numbers_are_named(folder, name, listed, use):
    change(folder, name, poisoned)
    if not listed:
        (folder / MANIFEST).unlink()
    with pytest.raises(ModelError, match=f"NaN or infinity in {name}"):
        use(folder)


@pytest.mark.parametrize("use", [quantkit.load, inspect_checkpoint])
def test_flipped_codes_are_named_with_verify(folder, use):
    change(folder, f"{LINEAR}.weight_packed", lambda t: t ^ 0x11111111)
    use(folder)
    with pytest.raises(ModelError, match=rf"{SHARD} is damaged or was changed in {LINEAR}.weight_packed;"):
        use(folder, verify=True)


def test_a_whole_checkpoint_passes(folder):
    quantkit.load(folder, verify=True)
    checks = inspect_checkpoint(folder, verify=True)["checks"]
    assert (checks["sizes"], checks["digests"], checks["changed"]) == (True, True, ())
    assert checks["tensors"] == 14 + 5
    assert inspect_checkpoint(folder)["checks"]["digests"] is False


def test_edits_beside_the_weights_are_told_and_only_verify_refuses_them(folder):
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    quantkit.load(folder)
    assert inspect_checkpoint(folder)["checks"]["changed"] == ("config.json",)
    with pytest.raises(ModelError, match=r"config.json is damaged or was changed;"):
        quantkit.load(folder, verify=True)


@pytest.mark.parametrize("use", [quantkit.load, inspect_checkpoint])
def test_a_size_and_a_missing_file_are_noticed(folder, use):
    raw = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(raw[:-8])
    with pytest.raises(ModelError, match=rf"{SHARD} has {len(raw) - 8} bytes instead of {len(raw)}"):
        use(folder)
    (folder / SHARD).unlink()
    with pytest.raises(ModelError, match=f"{SHARD} is missing"):
        use(folder)


@pytest.mark.parametrize("use", [quantkit.load, inspect_checkpoint])
def test_stray_weights_are_noticed(folder, use):
    save_file({"x": torch.zeros(2)}, folder / "other.safetensors")
    with pytest.raises(ModelError, match=r"do not belong to its checkpoint.*other.safetensors"):
        use(folder)
    (folder / "other.safetensors").unlink()
    (folder / MANIFEST).unlink()
    index = folder / f"{SHARD}.index.json"
    index.write_text(json.dumps({"weight_map": {"x": SHARD}}))  # as some tools write it beside a single file
    use(folder)
    save_file({"x": torch.zeros(2)}, folder / "other.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": "other.safetensors"}}))
    with pytest.raises(ModelError, match="holds both"):
        use(folder)


def test_without_a_manifest_there_is_nothing_to_verify(folder):
    (folder / MANIFEST).unlink()
    assert inspect_checkpoint(folder)["checks"]["sizes"] is False
    with pytest.raises(ModelError, match="no digests to verify"):
        quantkit.load(folder, verify=True)


FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
INT8 = FP8 | {"type": "int"}


@pytest.mark.parametrize(
    "quantization",
    [
        {
            "format": "float-quantized",
            "config_groups": {"g": {"targets": ["Linear"], "weights": FP8 | {"symmetric": False}}},
        },
        {
            "format": "int-quantized",
            "config_groups": {
                "g": {"targets": ["Linear"], "weights": INT8, "input_activations": INT8 | {"dynamic": True}}
            },
        },
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": ["gptq"]},
        {"config_groups": {"g": ["Linear"]}},
        {
            "config_groups": {
                "g": {"targets": ["re:*.mlp"], "weights": {"num_bits": 4, "strategy": "channel"}}
            }
        },
        {"config_groups": {"g": {"targets": ["re:(.*)*x$"], "weights": {"num_bits": True}}}},
        {"config_groups": {"g": {"targets": 7, "weights": {"num_bits": 4, "strategy": "channel"}}}},
        "pack-quantized",
        7,
        [],
        {},
    ],
    ids=str,
)
def test_what_is_not_read_gets_one_answer_everywhere(folder, quantization):
    import json

    config = json.loads((folder / "config.json").read_text())
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config["quantization_config"] = (
        base | quantization if isinstance(quantization, dict) and quantization else quantization
    )
    (folder / "config.json").write_text(json.dumps(config))
    messages = []
    for use in (quantkit.load, inspect_checkpoint):
        with pytest.raises(ModelError) as refused:
            use(folder)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
