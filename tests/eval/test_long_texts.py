"""Long texts of two models: divergence by position along the baseline's text, where they part, repetition, loops."""

import json

import pytest
import torch
from quantkit_eval import EvalError, Side, exact_cache, long_generation, long_texts
from quantkit_eval.long_report import loop, repetition
from quantkit_eval.sampler import Sampling
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

NEW, PROMPT = 20, 8
GREEDY = {"greedy": Sampling()}


class WrongAfter(DynamicLayer):
    """An exact cache until `first` tokens are in; later values are doubled."""

    first = PROMPT + 12

    def update(self, keys, values, *args, **kwargs):
        late = self.is_initialized and self.get_seq_length() >= self.first
        return super().update(keys, values * (2 if late else 1), *args, **kwargs)


def wrong():
    cache = DynamicCache()
    cache.layers = [WrongAfter() for _ in range(3)]
    cache.exact_chunk = 1
    return cache


def run(model, tokenizer, text, baseline, **options):
    options = {"new_tokens": NEW, "sequences": 2, "prompt_tokens": PROMPT} | options
    return long_generation(model, tokenizer, text, baseline, **options)


def test_a_model_does_not_differ_from_itself(model, tokenizer, text, monkeypatch):
    monkeypatch.setattr(long_texts, "_AT_ONCE", 5)  # the prompt of 8 ends inside a part
    seen = []
    found = run(model, tokenizer, text, Side(model, DynamicCache), progress=lambda *now: seen.append(now))
    assert [written.way for written in found.written] == ["greedy", "sampled"]
    for written in found.written:
        assert written.kl_max < 2e-6
        assert written.top1_agreement == 1
        assert written.repetition == written.repetition_baseline
        assert (written.repetition_difference, written.loops) == (0, written.loops_baseline)
        assert written.first_difference == [None] * 2
        assert [(b.first, b.last, b.parted) for b in written.curve] == [
            (i, i + 1, 0) for i in range(1, NEW, 2)
        ]
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["schema"] == "quantkit-long/1"
    assert seen == [(i, 8 * NEW) for i in range(1, 8 * NEW + 1)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_error_in_a_cache_shows_where_it_begins(model, tokenizer, text, temperature):
    ways = {"one": Sampling(temperature, seed=7)}
    found = run(Side(model, wrong), tokenizer, text, Side(model, exact_cache(model)), ways=ways)
    (written,) = found.written
    kl = [bucket.kl_mean for bucket in written.curve]
    assert max(kl[:6]) < 2e-6  # 12 new tokens go in as they are
    assert all(value > 1e-4 for value in kl[6:])
    assert written.kl_mean == pytest.approx(sum(kl) / len(kl))
    assert written.kl_max >= max(kl)
    assert written.kl_mean_se > 0
    assert all(at is None or at >= 13 for at in written.first_difference)
    assert (written.temperature, written.seed) == (temperature, 7 if temperature else None)
    assert (found.sequences, found.cache) == (2, "DynamicCache")


@torch.no_grad()
def test_divergence_is_along_the_text_of_the_baseline(model, other, tokenizer, text):
    """A single text by hand: both models are given what the baseline writes."""
    (found,) = run(other, tokenizer, text, model, sequences=1, ways=GREEDY).written
    tokens = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:PROMPT]
    own, kl = list(tokens), []
    for _ in range(NEW):
        base, log_p = (
            m(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1) for m in (model, other)
        )
        kl.append(float((base.exp() * (base - log_p)).sum()))
        tokens.append(int(base.argmax()))
        own.append(int(other(input_ids=torch.tensor([own])).logits[0, -1].argmax()))
    assert [bucket.kl_mean for bucket in found.curve] == pytest.approx(
        [sum(kl[i : i + 2]) / 2 for i in range(0, NEW, 2)], rel=1e-3
    )
    assert found.kl_mean_se is None
    first = next(i for i in range(NEW) if tokens[PROMPT + i] != own[PROMPT + i])
    assert found.first_difference == [first + 1]
    assert [bucket.parted for bucket in found.curve] == [float(first + 1 <= i + 2) for i in range(0, NEW, 2)]
    assert found.repetition == [repetition(own[PROMPT:])]
    assert found.repetition_baseline == [repetition(tokens[PROMPT:])]


def test_a_writer_writes_in_the_place_of_its_model(model, other, tokenizer, text):
    same = run(Side(model, writer=other), tokenizer, text, model, ways=GREEDY)
    assert same.written[0].kl_max < 2e-6
    assert (
        same.written[0].first_difference
        == run(other, tokenizer, text, model, ways=GREEDY).written[0].first_difference
    )


def test_one_seed_gives_one_result(model, other, tokenizer, text):
    options = {"sequences": 1, "new_tokens": 10}
    once, again = (run(other, tokenizer, text, model, **options) for _ in range(2))
    assert once == again
    ways = {"sampled": Sampling(1.0, seed=1)}
    assert run(other, tokenizer, text, model, ways=ways, **options).written[0] != once.written[1]


def test_seeds_go_on_behind_the_largest_one(model, tokenizer, text):
    ways = {"last": Sampling(1.0, seed=2**64 - 1)}
    assert run(model, tokenizer, text, model, ways=ways, new_tokens=2).written[0].seed == 2**64 - 1


def test_one_token_is_a_text(model, other, tokenizer, text):
    found = run(other, tokenizer, text, model, new_tokens=1)
    assert [len(written.curve) for written in found.written] == [1, 1]


def test_repetition_is_the_share_of_phrases_seen_before():
    assert repetition(list(range(50))) == 0
    assert repetition([1, 2] * 50) == pytest.approx(1 - 2 / 97)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)
    assert repetition([1, 2]) == 0


def test_a_loop_is_an_end_that_comes_three_times():
    assert loop([9, 8, *[1, 2, 3, 4, 5] * 3]) == 3
    assert loop([9, 8, *[1, 2, 3, 4, 5] * 2, 1, 2, 3, 4]) is None
    assert loop([5] * 12) == 1
    assert loop([5] * 11) is None
    assert loop([*[1, 2, 3, 4, 5] * 9, 7]) is None  # it got out
    assert loop([7, *[1, 2] * 30]) == 2


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
        run(model, tokenizer, text, model, **options)


def test_another_vocabulary_is_refused(model, tokenizer, text, scripted):
    base = scripted(lambda ids: torch.zeros(*ids.shape, 200), vocabulary=200)
    with pytest.raises(EvalError, match="128 tokens in the model, 200 in the baseline"):
        run(model, tokenizer, text, base, ways=GREEDY)
