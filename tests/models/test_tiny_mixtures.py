"""The tiny mixtures that other tests use: what is saved is the model, in each of the layouts."""

import pytest
import tiny_mixtures
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from quantkit.models.experts import shape_of


def reloaded(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    tiny_mixtures.eager(model)
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", tiny_mixtures.MIXTURES)
def test_a_saved_mixture_is_the_model_and_its_experts_matter(name, tmp_path):
    model, ids = tiny_mixtures.build(name), tiny_models.ids(12)
    wanted = model(input_ids=ids, use_cache=False).logits
    tiny_models.save(model, tmp_path)
    assert torch.equal(reloaded(tmp_path, ids), wanted)
    for module in tiny_mixtures.experts(model).values():
        module.get_parameter(shape_of(module).stacks["down"]).zero_()
    assert (model(input_ids=ids, use_cache=False).logits - wanted).abs().max() > 0.1


def test_stacked_experts_are_the_same_model(tmp_path):
    model, ids = tiny_mixtures.build("qwen3_moe"), tiny_models.ids(12)
    tiny_mixtures.stacked(tiny_models.save(model, tmp_path))
    torch.testing.assert_close(reloaded(tmp_path, ids), model(input_ids=ids, use_cache=False).logits)
