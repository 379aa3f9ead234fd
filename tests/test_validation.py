"""`validate` finds every kind of mistake at once, without torch."""

import json
import shutil

import pytest

from quantkit import assets
from quantkit.errors import DataError, ModelError, RecipeError, UserError
from quantkit.pipeline.quantize import quantize
from quantkit.validation import validate

BOOKWORM = str(assets.default_model())


def written(tmp_path, text):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return file


def test_without_a_model_only_the_recipe_is_checked():
    found = validate("w4a16-gptq", overrides=["weights.bits=3"])
    assert found.recipe.weights.bits == 3
    assert found.plan is None
    assert found.prediction is None


@pytest.mark.parametrize("name", assets.recipe_names())
def test_every_shipped_recipe_fits_the_embedded_model(name):
    found = validate(name, BOOKWORM)
    assert found.plan.n_blocks == 8
    assert found.prediction.tensors < (assets.default_model() / "model.safetensors").stat().st_size


def test_a_tied_head_hides_no_group_size(tmp_path):
    recipe = written(
        tmp_path, "weights: {group_size: 96, algorithm: rtn}\nrules:\n  - {match: lm_head, bits: 8}\n"
    )
    with pytest.raises(RecipeError) as caught:
        validate(recipe, BOOKWORM)
    lines = str(caught.value).splitlines()
    assert "'lm_head' fits lm_head, which shares its weight" in lines[0]
    assert sum("is not divisible by group_size=96" in line for line in lines) == len(lines) - 1 >= 4
    assert all("use group_size 128, 64, 32, channel" in line for line in lines[1:])


def test_mistakes_of_recipe_data_and_model_come_together(tmp_path):
    recipe = written(
        tmp_path,
        "weights: {algorithm: rtn}\nrules: [{match: nothing, bits: 3}]\n"
        "calibration: {data: [gone.txt, a.pdf, {source: b.txt, split: x}]}\n",
    )
    for name in ("a.pdf", "b.txt"):
        (tmp_path / name).write_text("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(UserError) as caught:
            validate(recipe, BOOKWORM)
    said = str(caught.value)
    for part in ("gone.txt", "a.pdf is a document", "has no split", "'nothing' fits no linear"):
        assert part in said


def test_a_broken_recipe_does_not_hide_a_broken_model(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(BOOKWORM, model)
    (model / "config.json").write_text(json.dumps({"model_type": 3}))
    recipe = written(tmp_path, "weights: {algorithm: rtn, bits: 9}")
    with pytest.raises(RecipeError) as caught:
        validate(recipe, str(model))
    assert "weights.bits" in str(caught.value)
    assert "config.json" in str(caught.value)


def test_one_mistake_keeps_its_kind(tmp_path):
    with pytest.raises(ModelError):
        validate("w4a16-gptq", str(tmp_path))
    with pytest.raises(DataError):
        validate("w4a16-gptq", overrides=["calibration.data=[gone.txt]"])
    with pytest.raises(ModelError, match="divisible"):
        validate("w4a16-rtn", BOOKWORM, ["weights.group_size=96"])


def test_a_file_that_cannot_travel_is_found_with_the_other_mistakes(tmp_path):
    shutil.copytree(BOOKWORM, tmp_path / "m")
    (tmp_path / "m" / "NOTICE").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError) as caught:
        validate("w4a16-gptq", str(tmp_path / "m"), ["weights.group_size=96"])
    assert "NOTICE is a symbolic link to a file outside the model's folder" in str(caught.value)
    assert "is not divisible by group_size=96" in str(caught.value)


def test_a_target_refuses_before_anything_is_computed(tmp_path):
    def targeted(target, weights="{preset: W4A16, algorithm: rtn}"):
        return written(tmp_path, f"weights: {weights}\ntarget: {target}\n")

    assert validate(targeted("{engine: vllm, tensor_parallel: 2, gpu: sm80}"), BOOKWORM).engines == ()
    with pytest.raises(RecipeError) as caught:
        validate(targeted("{engine: vllm, tensor_parallel: 4, gpu: sm80}"), BOOKWORM)
    said = str(caught.value)
    assert said.startswith("target: vLLM on sm80, tensor_parallel 4: model.layers.*.")
    assert "o_proj (8): in_features 256 / tensor_parallel 4 = 64 is not whole groups of 128" in said
    with pytest.raises(RecipeError, match="W4A16 g128 sym has no kernel in vLLM on cpu-avx2"):
        quantize(targeted("{engine: vllm, gpu: cpu-avx2}"), BOOKWORM, tmp_path / "out", evaluate=False)
    assert not (tmp_path / "out").exists()
    assert validate(targeted("quantkit", "{preset: W2A16, algorithm: rtn}"), BOOKWORM).plan


def test_without_a_target_the_engines_that_run_it_are_named():
    engines = dict(reversed(each) for each in validate("w2a16-gptq", BOOKWORM).engines)
    assert engines["quantkit"]
    assert any(said.startswith("vLLM on cpu: ") and not runs for said, runs in engines.items())
