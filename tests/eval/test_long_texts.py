"""Long texts written with a cache: the KL by position, and how much they repeat."""

import json

import pytest
import torch
from quantkit_eval import EvalError, long_generation, long_texts
from quantkit_eval.long_texts import repetition
from quantkit_eval.sampler import Sampling
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

NEW, PROMPT = 20, 8


class WrongAfter(DynamicLayer):
    """An exact cache until `first` tokens are in; later values are doubled."""

    first = PROMPT + 12

    def update(self, keys, values, *args, **kwargs):
        late = self.is_initialized and self.get_seq_length() >= self.first
        return super().update(keys, values * (2 if late else 1), *args, **kwargs)


def wrong():
    cache = DynamicCache()
    cache.layers = [WrongAfter() for _ in range(3)]
    return cache


def run(model, tokenizer, text, cache=DynamicCache, **options):
    options = {"new_tokens": NEW, "sequences": 2, "prompt_tokens": PROMPT} | options
    return long_generation(model, tokenizer, text, cache, **options)


def test_an_exact_cache_does_not_differ_from_itself(model, tokenizer, text, monkeypatch):
    monkeypatch.setattr(long_texts, "_AT_ONCE", 5)  # the prompt of 8 ends inside a part
    seen = []
    found = run(model, tokenizer, text, progress=lambda *now: seen.append(now))
    assert found.kl_max < 2e-6
    assert found.top1_agreement == 1
    assert found.repetition == found.repetition_exact
    assert found.first_difference == [None] * 2
    assert [(b.first, b.last) for b in found.curve] == [(i, i + 1) for i in range(1, NEW, 2)]
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["schema"] == "quantkit-long-generation/1"
    assert seen == [(i, 2 * NEW) for i in range(1, 2 * NEW + 1)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_error_shows_where_it_begins(model, tokenizer, text, temperature):
    found = run(model, tokenizer, text, wrong, sampling=Sampling(temperature, seed=7))
    kl = [bucket.kl_mean for bucket in found.curve]
    assert max(kl[:6]) < 2e-6  # 12 new tokens go in as they are
    assert all(value > 1e-4 for value in kl[6:])
    assert found.kl_mean == pytest.approx(sum(kl) / len(kl))
    assert found.kl_max >= max(kl)
    assert found.kl_mean_se > 0
    assert all(at is None or at >= 13 for at in found.first_difference)
    assert (found.temperature, found.seed, found.sequences) == (temperature, 7, 2)


@torch.no_grad()
def test_the_divergence_is_on_the_tokens_that_were_written(model, tokenizer, text):
    """A single text by hand: the last distribution of each cache, given all tokens before it."""
    found = run(model, tokenizer, text, wrong, sequences=1, new_tokens=20, sampling=Sampling(seed=None))
    tokens = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:PROMPT]
    cache, log_p, base = wrong(), None, None
    given = torch.tensor([tokens])
    kl = []
    for _ in range(20):
        log_p = model(input_ids=given, past_key_values=cache, use_cache=True).logits[0, -1].log_softmax(-1)
        tokens.append(int(log_p.argmax()))
        base = model(input_ids=torch.tensor([tokens[:-1]])).logits[0, -1].log_softmax(-1)
        kl.append(float((base.exp() * (base - log_p)).sum()))
        given = torch.tensor([tokens[-1:]])
    assert found.kl_mean == pytest.approx(sum(kl) / 20, rel=1e-3)
    assert found.kl_mean_se is None


def test_one_seed_gives_one_result(model, tokenizer, text):
    options = {"sequences": 1, "new_tokens": 10}
    once, again = (run(model, tokenizer, text, wrong, **options) for _ in range(2))
    assert once == again
    assert run(model, tokenizer, text, wrong, sampling=Sampling(1.0, seed=1), **options) != once


def test_repetition_is_the_share_of_phrases_seen_before():
    assert repetition(list(range(50))) == 0
    assert repetition([1, 2] * 50) == pytest.approx(1 - 2 / 97)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)
    assert repetition([1, 2]) == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"new_tokens": 0}, "new_tokens must be at least 1"),
        ({"new_tokens": 121}, "8 tokens of prompt and 121 new ones are more than the model's 128"),
        ({"sequences": 0}, "sequences must be at least 1"),
        ({"sequences": 1000}, r"the text has \d+ prompts of 8 tokens, 1000 are needed"),
        ({"prompt_tokens": 1}, "prompt_tokens must be at least 2"),
    ],
)
def test_what_cannot_be_generated_is_told(model, tokenizer, text, options, told):
    with pytest.raises(EvalError, match=told):
        run(model, tokenizer, text, **options)
