"""Weights come back as they were stored, or not at all."""

import json
import os

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from quantkit.errors import ModelError
from quantkit.models import source as module
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.models.tensors import DTYPES, stored_dtype, torch_dtype

TINY = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
}


def make(folder, tensors, **config):
    (folder / "config.json").write_text(json.dumps(TINY | config))
    save_file(tensors, folder / "model.safetensors")
    return Source(read_checkpoint(folder))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [4, 12, 1 << 20])
def test_tensor_equals_what_was_saved(tmp_path, monkeypatch, stored, wanted, chunk):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    tensors = {
        "model.a.weight": torch.randn(5, 7).to(stored),
        "model.b.weight": torch.randn(3).to(stored),
        "model.scalar": torch.tensor(2.5, dtype=stored),
        "model.empty": torch.empty(0, 4, dtype=stored),
    }
    source = make(tmp_path, tensors)
    for name, tensor in tensors.items():
        read = source.tensor(name, wanted)
        assert read.dtype == (wanted or stored)
        assert torch.equal(read, tensor.to(read.dtype)), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float32])
def test_values_that_are_not_finite_name_the_tensor(tmp_path, monkeypatch, bad, dtype, wanted):
    monkeypatch.setattr(module, "CHUNK_BYTES", 16)
    weight = torch.randn(9, 5).to(dtype)
    weight[7, 3] = bad
    source = make(tmp_path, {"model.bad.weight": weight, "model.good.weight": torch.ones(2)})
    with pytest.raises(ModelError, match=r"model\.bad\.weight holds NaN or infinite"):
        source.tensor("model.bad.weight", wanted)
    source.tensor("model.good.weight", wanted)


def test_overflow_of_a_cast_is_not_silent(tmp_path):
    source = make(tmp_path, {"model.a": torch.tensor([1e6])})
    with pytest.raises(ModelError, match=r"model\.a overflows in torch\.float16"):
        source.tensor("model.a", torch.float16)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    source = make(tmp_path, {"model.a": torch.ones(64)})
    os.truncate(tmp_path / "model.safetensors", source.raw("model.a").offset + 8)
    with pytest.raises(ModelError, match=r"ends inside tensor model\.a"):
        source.tensor("model.a")


def test_a_file_that_goes_away(tmp_path):
    source = make(tmp_path, {"model.a": torch.ones(64)})
    (tmp_path / "model.safetensors").unlink()
    for read in (lambda: source.tensor("model.a"), source.digest):
        with pytest.raises(ModelError, match="cannot be read"):
            read()


def test_the_tensor_owns_its_memory(tmp_path):
    """Weights stay what they are when the file changes: nothing is mapped."""
    source = make(tmp_path, {"model.a": torch.ones(64)})
    read = source.tensor("model.a")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(source.raw("model.a").offset)
        file.write(bytes(256))
    assert torch.equal(read, torch.ones(64))


def test_tensors_are_named_as_on_disk(tmp_path):
    source = make(
        tmp_path,
        {"h.0.ln_1.weight": torch.ones(4), "h.0.attn.bias": torch.ones(4, dtype=torch.uint8)},
        model_type="gpt2",
    )
    assert source.names() == ["h.0.ln_1.weight"]
    assert torch.equal(source.tensor("h.0.ln_1.weight"), torch.ones(4))
    with pytest.raises(ModelError, match="no tensor nothing"):
        source.tensor("nothing")


def test_same(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 8)
    a = torch.randn(7)
    other = a.clone()
    other[-1] += 1
    source = make(tmp_path, {"a": a, "b": a.clone(), "c": other, "d": a.half(), "e": a[:6].clone()})
    assert source.same("a", "b")
    assert [source.same("a", n) for n in "cde"] == [False] * 3


def test_digest_sees_weights_config_and_tokenizer_only(tmp_path):
    tensors = {"model.a": torch.ones(4)}
    digests = [make(tmp_path, tensors).digest()]
    (tmp_path / "README.md").write_text("words")
    assert make(tmp_path, tensors).digest() == digests[0]
    (tmp_path / "tokenizer.json").write_text("{}")
    digests.append(make(tmp_path, tensors).digest())
    digests.append(make(tmp_path, tensors, vocab_size=17).digest())
    digests.append(make(tmp_path, {"model.a": torch.zeros(4)}).digest())
    assert len(set(digests)) == 4


@pytest.mark.parametrize("bad", [{"model_type": "no-such-model"}, {"hidden_size": "wide"}])
def test_a_config_transformers_refuses(tmp_path, bad):
    source = make(tmp_path, {"model.a": torch.ones(4)}, **bad)
    with pytest.raises(ModelError, match=r"config\.json is refused by transformers"):
        _ = source.config


def test_every_stored_dtype_has_its_torch_dtype_and_size():
    for name, (bits, _) in DTYPES.items():
        dtype = torch_dtype(name)
        assert stored_dtype(dtype) == name
        assert torch.empty((), dtype=dtype).element_size() * 8 == bits


def test_hashing_tells_how_far_it_is(tmp_path, monkeypatch):
    """Reading a big source takes minutes: the display hears of it, with shares that grow to at most 1."""
    tiny_models.save(tiny_models.FAMILIES["llama"](), tmp_path, max_shard_size="40KB")
    seconds = iter(range(0, 10_000, 2))
    monkeypatch.setattr("quantkit.models.digests.time.monotonic", lambda: next(seconds))
    shares = []
    source = Source(read_checkpoint(tmp_path))
    digest = source.digest(shares.append)
    assert shares == sorted(shares)
    assert len(shares) > 5
    assert 0 < shares[0] < 0.5
    assert shares[-1] == 1
    assert source.digest(shares.append) == digest == Source(read_checkpoint(tmp_path)).digest()
