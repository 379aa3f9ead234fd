import pytest
from transformers import AutoTokenizer

from quantkit import assets


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets.default_model(), trust_remote_code=False)


@pytest.fixture
def chatty():
    tokenizer = AutoTokenizer.from_pretrained(assets.default_model(), trust_remote_code=False)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    return tokenizer
