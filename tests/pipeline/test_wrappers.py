"""A multimodal checkpoint: its language model is quantized, everything else travels bit for bit."""

import json
import re

import pytest
import tiny_models
import tiny_wrappers
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.checkpoint.manifest import read_manifest
from quantkit.models.tensors import read_tensors
from quantkit.preflight.target import Target
from quantkit.validation import validate

RECIPE = {
    "weights": {"preset": "W8A16", "algorithm": "rtn", "group_size": 32},
    "calibration": {"samples": 4, "sequence_length": 32},
}
GPTQ = {
    "weights": {"preset": "W4A16", "algorithm": "gptq", "group_size": 32},
    "transforms": ["awq"],
    "calibration": {"samples": 6, "sequence_length": 32},
}


def tensors_of(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def logits(model, **given):
    given = given or {"input_ids": tiny_models.ids(20, 2, 100)}
    with torch.no_grad():
        return model(**given, use_cache=False).logits


@pytest.fixture(scope="module", params=sorted(tiny_wrappers.WRAPPERS))
def quantized(request, tmp_path_factory):
    """(name, dense wrapper, source folder, output folder, result)."""
    folder = tmp_path_factory.mktemp(request.param)
    dense = tiny_wrappers.save(request.param, folder / "source")
    result = quantkit.quantize(GPTQ, folder / "source", folder / "out", evaluate=False, device="cpu")
    return request.param, dense, folder / "source", folder / "out", result


def test_everything_beside_the_language_model_is_carried_bit_for_bit(quantized):
    _, _, source, out, result = quantized
    before, after = tensors_of(source), tensors_of(out)
    became = result.manifest.tensors
    assert became.keys() == before.keys()
    linears = {name for name, record in became.items() if record.how == "quantized"}
    assert len(linears) == 14
    towers = [name for name in before if re.search("vision|visual|projector|connector", name)]
    assert towers
    for name in towers:
        assert became[name].how == "copied"
    for name, record in became.items():
        if record.how == "copied":
            assert before[name].dtype == after[name].dtype, name
            assert torch.equal(before[name], after[name]), name
    for name in linears:
        assert f"{name.removesuffix('weight')}weight_packed" in after


def test_files_of_the_processor_are_the_same_bytes(quantized):
    _, _, source, out, _ = quantized
    for name in (*tiny_wrappers.SIDE_FILES, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name


def test_the_loaded_wrapper_computes_text_as_its_dequantized_language_model_does(quantized):
    """The same codes, put as dense weights into the dense wrapper that was never packed."""
    name, _, _, out, _ = quantized
    loaded = quantkit.load(out, device="cpu", backend="reference")
    assert type(loaded).__name__ == type(tiny_wrappers.build(name)).__name__
    dense = quantkit.load(out, device="cpu", backend="reference").dequantize(torch.float32)
    assert torch.allclose(logits(loaded), logits(dense), atol=2e-4, rtol=1e-4)
    text = dense.get_decoder()
    hidden = text(input_ids=tiny_models.ids(20, 2, 100), use_cache=False).last_hidden_state
    assert torch.allclose(dense.lm_head(hidden), logits(loaded), atol=2e-4, rtol=1e-4)


def test_validate_finds_the_language_model_without_building_anything(quantized, tmp_path):
    _, _, source, _, result = quantized
    (tmp_path / "recipe.yaml").write_text(json.dumps(GPTQ))
    plan = validate(str(tmp_path / "recipe.yaml"), str(source)).plan
    names = {
        name.removesuffix(".weight") for name, r in result.manifest.tensors.items() if r.how == "quantized"
    }
    assert {layer.name for layer in plan.layers} == names
    assert plan.n_blocks == 2


def test_ignore_covers_the_towers_by_patterns_that_fit_every_spelling(quantized):
    _, dense, _, out, result = quantized
    ignore = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]

    def ignored(name):
        return any(name == each or (each[:3] == "re:" and re.match(each[3:], name)) for each in ignore)

    planned = {
        name.removesuffix(".weight") for name, r in result.manifest.tensors.items() if r.how == "quantized"
    }
    assert not any(map(ignored, planned))
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear):
            inside = "language_model.layers" in name or "text_model.layers" in name
            assert ignored(name) != inside, name
    assert any(each.startswith("re:.*vis") for each in ignore)


def test_scales_of_a_cache_are_stored_beside_the_attention_on_disk(tmp_path):
    """`language_model.model.layers` on disk is `model.language_model.layers` in the model."""
    dense = tiny_wrappers.save("llava", tmp_path / "source")
    recipe = RECIPE | {"kv_cache": "FP8"}
    result = quantkit.quantize(recipe, tmp_path / "source", tmp_path / "out", evaluate=False, device="cpu")
    scales = [name for name, record in result.manifest.tensors.items() if record.how == "added"]
    assert "language_model.model.layers.1.self_attn.k_scale" in scales
    assert len(scales) == 4
    loaded, wanted = logits(quantkit.load(tmp_path / "out", device="cpu")), logits(dense)
    assert (loaded - wanted).norm() < 0.05 * wanted.norm()


def test_bounds_of_a_tower_may_be_infinite(tmp_path):
    """Gemma 4's audio tower stores them."""
    tiny_wrappers.save("llava", tmp_path / "source")
    file = tmp_path / "source/model.safetensors"
    bound = {"audio_tower.layers.0.input_max": torch.tensor([float("inf")])}
    save_file(load_file(file) | bound, file, metadata={"format": "pt"})
    quantkit.quantize(RECIPE, tmp_path / "source", tmp_path / "out", evaluate=False, device="cpu")
    quantkit.load(tmp_path / "out", device="cpu")
    assert torch.isinf(tensors_of(tmp_path / "out")["audio_tower.layers.0.input_max"]).all()


def test_the_engine_finds_every_linear_as_it_is_stored(quantized):
    target = inspect_checkpoint(quantized[3], target=Target("vllm", 1, "sm90"))["target"]
    assert [f for f in target["findings"] if f["rule"] in ("names", "siblings")] == []


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_picture_goes_through_the_tower_of_the_loaded_wrapper(tmp_path, name):
    dense = tiny_wrappers.save(name, tmp_path / "source")
    quantkit.quantize(RECIPE, tmp_path / "source", tmp_path / "out", evaluate=False, device="cpu")
    loaded = quantkit.load(tmp_path / "out", device="cpu")
    ids = tiny_models.ids(12, 1, 100)
    ids[0, 3 : 3 + (4 if name == "llava" else 1)] = tiny_wrappers.IMAGE
    picture = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "pixel_values": picture}
    if name == "gemma3":
        given["token_type_ids"] = (ids == tiny_wrappers.IMAGE).long()
    wanted, found = logits(dense, **given), logits(loaded, **given)
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert (logits(dense, **given | {"pixel_values": -picture}) - wanted).norm() > 0.01 * wanted.norm()


def test_names_of_an_older_spelling_stay_as_they_are(tmp_path):
    """LLaVA checkpoints say `language_model.model.layers`, today's module is `model.language_model.layers`."""
    dense = tiny_wrappers.save("llava", tmp_path / "source")
    held = tensors_of(tmp_path / "source")
    assert "language_model.model.layers.0.mlp.up_proj.weight" in held
    quantkit.quantize(RECIPE, tmp_path / "source", tmp_path / "out", evaluate=False, device="cpu")
    _, written = read_tensors(tmp_path / "out")
    assert "language_model.model.layers.0.mlp.up_proj.weight_packed" in written
    renamed = {name.replace("language_model.model.", "model.language_model."): t for name, t in held.items()}
    renamed = {name.replace("language_model.lm_head", "lm_head"): t for name, t in renamed.items()}
    save_file(renamed, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    quantkit.quantize(RECIPE, tmp_path / "source", tmp_path / "again", evaluate=False, device="cpu")
    _, written = read_tensors(tmp_path / "again")
    assert "model.language_model.layers.0.mlp.up_proj.weight_packed" in written
    loaded = [quantkit.load(tmp_path / folder, device="cpu") for folder in ("out", "again")]
    assert torch.equal(*map(logits, loaded))
    assert (logits(loaded[0]) - logits(dense)).norm() < 0.03 * logits(dense).norm()
    assert read_manifest(tmp_path / "out").layers[0].name.startswith("language_model.model.layers.0")
