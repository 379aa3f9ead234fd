"""A model spread by accelerate, one with a text config inside."""

import pytest
import tiny_models
import torch
from accelerate import cpu_offload
from quantkit_eval import evaluate, generate_stream
from quantkit_eval.model import device_of, inference


def test_an_offloaded_model_gives_the_same_report(model, tokenizer, text):
    offloaded = tiny_models.FAMILIES["llama-gqa"]()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta"
    assert device_of(offloaded).type == "cpu"
    reports = [evaluate(m, tokenizer, text, context=32).quantized for m in (model, offloaded)]
    assert reports[0] == reports[1]
    texts = [generate_stream(m, tokenizer, "the", 4).text for m in (model, offloaded)]
    assert texts[0] == texts[1]


def test_modes_come_back_after_an_error():
    model = tiny_models.FAMILIES["llama-gqa"]().train()
    seen = []

    def fail():
        seen.append((model.training, torch.is_grad_enabled()))
        raise KeyError

    with pytest.raises(KeyError), inference(model):
        fail()
    assert seen == [(False, False)]
    assert model.training
    assert torch.is_grad_enabled()
