"""The model with outlier channels is the original in other weights."""

import json

import pytest
import tiny_models
import torch

from quantkit.bench.quality.outliers import FACTORS, inject
from quantkit.checkpoint.load import load
from quantkit.errors import OutputError


@pytest.fixture
def model(tmp_path):
    return tiny_models.save(tiny_models.build("llama-gqa"), tmp_path / "model", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["opt", "phi3-gqa", "gpt2"])
def test_no_logit_moves(tmp_path, name):
    """Powers of two are exact, so a single bit that differs is a weight in the wrong place."""
    folder = tiny_models.save(tiny_models.build(name), tmp_path / "model", dtype=torch.bfloat16)
    assert inject(tmp_path / "out", folder, channels=2) == 0


def test_norms_that_store_one_less_keep_the_function_in_float32(tmp_path):
    folder = tiny_models.save(tiny_models.build("gemma2"), tmp_path / "model")
    assert inject(tmp_path / "out", folder, channels=2) < 1e-4


@torch.no_grad()
def test_norms_and_the_up_projection_have_the_outliers_and_the_values_have_none(tmp_path, model):
    inject(tmp_path / "out", model, channels=3)
    old, new = (
        load(path, device="cpu").get_submodule("model.layers.1") for path in (model, tmp_path / "out")
    )
    names = ("input_layernorm", "post_attention_layernorm")
    norms = [new.get_parameter(f"{n}.weight") / old.get_parameter(f"{n}.weight") for n in names]
    rows = (new.mlp.up_proj.weight * norms[1] / old.mlp.up_proj.weight).amax(1)  # columns take the inverse
    for ratio in (*norms, rows):
        outliers = ratio[ratio != 1].tolist()
        assert len(outliers) == 3
        assert set(outliers) <= set(FACTORS)
    assert torch.equal(new.self_attn.v_proj.weight * norms[0], old.self_attn.v_proj.weight)


def test_the_same_seed_gives_the_same_bytes_in_an_ordinary_checkpoint(tmp_path, model):
    for name in ("one", "two"):
        inject(tmp_path / name, model, seed=5)
    inject(tmp_path / "other", model, seed=6)

    def files(name):
        return {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}

    assert files("one") == files("two")
    assert files("one") != files("other")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert "quantization_config" not in config
    assert {"tokenizer.json", "model.safetensors.index.json"} <= files("one").keys()


def test_a_folder_that_is_in_use_is_left_alone(tmp_path, model):
    with pytest.raises(OutputError, match="not empty"):
        inject(model, model)
