"""A tiny Llama over single characters, another one, and a text for both."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from torch import nn

LINE = "the quick brown fox jumps over the lazy dog, 1234 times.\n"


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_models.tokenizer()


@pytest.fixture(scope="session")
def model():
    return tiny_models.FAMILIES["llama-gqa"]()


@pytest.fixture(scope="session")
def other():
    """The model with its weights moved: the same vocabulary, other logits."""
    found = tiny_models.FAMILIES["llama-gqa"]()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return found


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i}: {LINE[i % 7 :]}" for i in range(6)))
    return path


@pytest.fixture
def with_bos(tokenizer):
    """The tokenizer, putting its BOS in front by itself."""

    def encode(text, add_special_tokens=True, verbose=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": [tokenizer.bos_token_id, *ids] if add_special_tokens else ids}

    return _Tokenizer(encode, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.decode)


class _Tokenizer:
    def __init__(self, encode, bos, eos, decode):
        self.encode, self.bos_token_id, self.eos_token_id, self.decode = encode, bos, eos, decode

    def __call__(self, *args, **keywords):
        return self.encode(*args, **keywords)


class Scripted(nn.Module):
    """A stand-in for a causal LM that gives chosen logits: `logits(ids) -> [batch, length, vocabulary]`."""

    def __init__(self, logits, vocabulary=128, longest=128):
        super().__init__()
        config = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=longest)
        self.config = SimpleNamespace(get_text_config=lambda: config)
        self.device = torch.device("cpu")
        self.calls = []
        self._logits = logits

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        self.calls.append(input_ids)
        return SimpleNamespace(logits=self._logits(input_ids), past_key_values=())


@pytest.fixture
def scripted():
    return Scripted
