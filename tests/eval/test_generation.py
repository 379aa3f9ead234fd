"""The stream is what transformers generates, told in pieces and timed in two parts."""

import pytest
import tiny_models
import torch
from quantkit_eval import EvalError, generate_stream

PROMPT = "the quick brown"


def greedy(model, tokenizer, new):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma3", "opt"])
def test_greedy_is_that_of_transformers(family, tokenizer):
    model = tiny_models.FAMILIES[family]()
    model.generation_config.eos_token_id = None
    pieces = []
    found = generate_stream(model, _without_end(tokenizer), PROMPT, 12, write=pieces.append)
    expected = tokenizer.decode(greedy(model, tokenizer, 12), skip_special_tokens=True)
    assert found.text == "".join(pieces) == expected
    assert (found.prompt_tokens, found.new_tokens, found.decode_steps) == (len(PROMPT), 12, 11)


def _without_end(tokenizer):
    plain = tiny_models.tokenizer()
    plain.eos_token = None
    return plain


def chain(ids):
    """Logits under which token i is followed by i + 1."""
    return torch.nn.functional.one_hot((ids + 1) % 128, 128).float() * 50


def test_the_cache_makes_each_step_one_token(scripted, tokenizer):
    model = scripted(chain)
    found = generate_stream(model, tokenizer, "ab", 4)
    assert found.text == "cdef"
    assert [ids.shape[1] for ids in model.calls] == [2, 1, 1, 1]


@pytest.mark.parametrize("ends", [None, 74, [3, 74]])
def test_it_stops_at_the_end_token(scripted, tokenizer, ends):
    """None: neither a generation config nor another end; the tokenizer's is then taken."""
    model = scripted(chain)
    first = tokenizer.convert_tokens_to_ids("a")
    stop = 74 if ends is not None else tokenizer.eos_token_id
    model._logits = lambda ids: chain(torch.where(ids >= first + 2, stop - 1, ids))
    if ends is not None:
        model.generation_config = type("Config", (), {"eos_token_id": ends})
    found = generate_stream(model, tokenizer, "a", 50)
    assert found.text == "bc"
    assert (found.new_tokens, found.decode_steps) == (2, 2)


def test_an_end_at_once_leaves_nothing_to_time(scripted, tokenizer):
    model = scripted(lambda ids: chain(torch.full_like(ids, tokenizer.eos_token_id - 1)))
    found = generate_stream(model, tokenizer, "a", 5)
    assert (found.text, found.new_tokens, found.decode_tokens_per_second) == ("", 0, None)
    assert found.prompt_tokens_per_second > 0


def test_seeds_repeat_and_leave_the_global_state(model, tokenizer):
    def run(seed):
        return generate_stream(model, tokenizer, PROMPT, 10, temperature=1.5, seed=seed).text

    state = torch.get_rng_state()
    texts = {seed: run(seed) for seed in (0, 1, 2)}
    assert {seed: run(seed) for seed in (0, 1, 2)} == texts
    assert len(set(texts.values())) > 1
    assert len({run(None) for _ in range(3)}) > 1
    assert torch.equal(state, torch.get_rng_state())


def test_speeds_are_tokens_over_seconds(model, tokenizer):
    found = generate_stream(model, tokenizer, PROMPT, 5)
    assert found.prompt_tokens_per_second == found.prompt_tokens / found.prompt_seconds
    assert found.decode_tokens_per_second == found.decode_steps / found.decode_seconds


def test_the_time_of_writing_is_not_the_models(scripted, tokenizer, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("quantkit_eval.loop.time.perf_counter", lambda: now[0])

    def logits(ids):
        now[0] += 1.0
        return chain(ids)

    def write(_):
        now[0] += 100.0

    found = generate_stream(scripted(logits), tokenizer, "ab", 4, write=write)
    assert (found.prompt_seconds, found.decode_seconds) == (1.0, 3.0)


def test_training_mode_comes_back(tokenizer):
    model = tiny_models.FAMILIES["llama-gqa"](attention_dropout=0.9).train()
    first, second = (generate_stream(model, tokenizer, PROMPT, 8).text for _ in range(2))
    assert first == second
    assert model.training


@pytest.mark.parametrize(
    ("prompt", "keywords", "told"),
    [
        ("", {}, "no tokens"),
        (
            "a" * 120,
            {"max_new_tokens": 9},
            "120 tokens of prompt and 9 new ones are more than the model's 128",
        ),
        ("a", {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ("a", {"temperature": -1.0}, "temperature must be 0 or more"),
        ("a", {"max_new_tokens": 1.5}, "max_new_tokens must be at least 1, got 1.5"),
        ("a", {"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ("a", {"top_k": -1}, "top_k must be 0 or more"),
        ("a", {"top_k": 0.5}, "top_k must be 0 or more"),
        ("a", {"seed": "x"}, r"seed must be an integer .* got x"),
        ("a", {"seed": 2**70}, "seed must be an integer from"),
        ("a", {"seed": -(2**63) - 1}, "seed must be an integer from"),
        ("a", {"top_p": 0.0}, "top_p must be above 0"),
        ("a", {"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ("caf\udce9", {}, "not valid UTF-8: character 4 is U\\+DCE9"),
    ],
)
def test_what_cannot_be_generated_is_told(model, tokenizer, prompt, keywords, told):
    with pytest.raises(EvalError, match=told):
        generate_stream(model, tokenizer, prompt, **keywords)


@pytest.mark.parametrize("wrong", ["</s>", [1, "2"], 1.5, {"a": 1}])
def test_end_tokens_that_are_no_tokens_are_told_before_the_model_runs(scripted, tokenizer, wrong):
    model = scripted(chain)
    model.generation_config = type("Config", (), {"eos_token_id": wrong})
    with pytest.raises(EvalError, match="mend generation_config"):
        generate_stream(model, tokenizer, "a", 5)
    assert model.calls == []


@pytest.mark.parametrize("wrong", [-1, 0, "many", 2.5, True])
def test_a_context_that_is_no_number_of_tokens_is_told(scripted, tokenizer, wrong):
    with pytest.raises(EvalError, match="max_position_embeddings: "):
        generate_stream(scripted(chain, longest=wrong), tokenizer, "a", 5)


def test_a_prompt_to_the_last_position_fits(model, tokenizer):
    assert generate_stream(model, tokenizer, "a" * 120, 8).new_tokens <= 8


def test_a_model_without_a_cache_is_refused(scripted, tokenizer):
    model = scripted(chain)
    forward = model.forward

    def without(**keywords):
        out = forward(**keywords)
        out.past_key_values = None
        return out

    model.forward = without
    with pytest.raises(EvalError, match="no key-value cache"):
        generate_stream(model, tokenizer, "ab", 5)
