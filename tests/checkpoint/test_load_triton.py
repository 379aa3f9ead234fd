"""A checkpoint loaded onto the Triton storage, whose twin runs on the CPU: one copy, given back exactly."""

import copy

import pytest
import torch
from quantkit_kernels.triton import backend

import quantkit
from quantkit.layers.quant_linear import QuantLinear
from quantkit.scheme import Scheme, integer

ASYM = Scheme(integer(4, 32, False))
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def folder(packed_llama, monkeypatch):
    monkeypatch.setattr(backend, "refuses", lambda *_: None)
    sizes = {"intermediate_size": 128, "num_key_value_heads": 4, "attention_bias": True}
    return packed_llama(ASYM, **sizes)[0]


def load(folder, **options):
    return quantkit.load(
        folder, **({"device": "cpu", "backend": "triton", "dtype": torch.bfloat16} | options)
    )


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def storages(model):
    tensors = [t for m in linears(model).values() for t in (m.codes, m.scales, m.zeros)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}, tensors


def test_a_copy_holds_every_layout_once(folder):
    model = load(folder)
    truth = logits(model)
    torch.testing.assert_close(truth, logits(load(folder, backend="reference")), rtol=0, atol=0.1)
    kept, tensors = storages(model)
    assert sum(kept.values()) == sum(t.nbytes for t in tensors)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), truth)
    assert sum(storages(twin)[0].values()) == sum(kept.values())
    assert not storages(twin)[0].keys() & kept.keys()


def test_saving_writes_what_was_loaded(folder, tmp_path):
    model = load(folder)
    logits(model)
    model.save_pretrained(tmp_path / "again")
    before = load(folder, backend="reference").state_dict()
    after = load(tmp_path / "again", backend="reference").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_hooks_of_accelerate_change_nothing(folder, tmp_path):
    names = (
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    )
    model = load(folder)
    hooked = load(folder, device=None, device_map=dict.fromkeys(names, "cpu"))
    assert torch.equal(logits(hooked), logits(model))
    places = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    options = {"device": None, "backend": None, "device_map": places, "offload_folder": tmp_path / "offload"}
    offloaded = load(folder, **options)
    assert all(module.backend != "triton" for module in linears(offloaded).values())
