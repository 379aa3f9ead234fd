"""The embedded mixture, and how it was made: what it must be for tests and measurements of experts."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit import assets
from quantkit.bench import upcycle
from quantkit.checkpoint.load import load
from quantkit.models.tokenizer import open_tokenizer


def windows(count, length, path):
    tokenizer = open_tokenizer(assets.mixture_model())
    text = path.read_text(encoding="utf-8")[: 8 * count * length]
    return torch.tensor(tokenizer(text)["input_ids"])[: count * length].view(count, length)


def test_the_embedded_mixture_is_good_and_its_experts_are_specialists():
    folder = assets.mixture_model()
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    model.set_experts_implementation("eager")
    config = model.config
    assert (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok) == (4, 8, 2)
    found = upcycle.specialisation(model, windows(4, 256, assets.evaluation_text()))
    assert found["perplexity"] < 120  # 363 of the bigram model
    assert found["perplexity_exchanged"] > 2 * found["perplexity"]
    for layer in found["layers"]:
        assert sum(layer["tokens_per_expert"]) == 2 * found["tokens"]
        assert min(layer["tokens_per_expert"]) > 0
        assert layer["by_token"] > 2 * layer["largest_share"]


def test_a_mixture_begins_as_the_dense_model_and_learns():
    dense = load(assets.default_model(), device="cpu")
    train, other = windows(16, 32, assets.calibration_text()).split([12, 4])
    model = upcycle.mixture_of(dense, train)
    before = upcycle.negative_log_likelihood(model.eval(), train)
    assert before < math.log(8192) - 1.5
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    done = upcycle.teach(model, dense, upcycle.Text(train, other, other), 0, steps=12)
    assert done["steps"] == 12
    assert upcycle.negative_log_likelihood(model, train) < before - 0.1
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)  # the embedding is not trained


def test_bigram_probabilities_sum_to_one_and_follow_the_counts():
    ids = torch.tensor([0, 1, 0, 1, 0, 2, 3, 0, 1, 4])
    bigram = upcycle.Bigram(ids, 7)
    p = torch.tensor(
        [
            [math.exp(-bigram.negative_log_likelihood(torch.tensor([[u, v]]))) for v in range(7)]
            for u in range(7)
        ]
    )
    assert p.sum(1).tolist() == pytest.approx([1.0] * 7, abs=1e-5)
    assert p[0].argmax() == 1
    assert p[0, 1] == pytest.approx((3 - 0.75) / 4 + 0.75 * 2 / 4 * bigram.unigram[1].item())
    assert p.min() > 0


def test_both_embedded_models_have_one_tokenizer():
    files = [folder / "tokenizer.json" for folder in (assets.default_model(), assets.mixture_model())]
    assert files[0].read_bytes() == files[1].read_bytes()
