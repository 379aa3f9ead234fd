"""A kept baseline gives the bits of one that runs, and runs only what is not kept."""

import pytest
import tiny_models
import torch
from quantkit_eval import evaluate
from quantkit_eval.baseline import KeptBaseline, fingerprint
from quantkit_eval.cache import Cache
from quantkit_eval.model import inference, run

FAMILIES = [
    "llama-gqa",
    "gpt2",
    "gemma2",
    "gemma3",
    "opt",
    "qwen3",
    "phi3-gqa",
    "gpt-neox",
    "falcon",
    "mistral",
]
OPTIONS = {"context": 32, "batch_size": 2}


@pytest.fixture
def make_cache(tmp_path):
    return lambda limit=1 << 30: Cache(tmp_path / "cache", limit, "subject")


def counted(model):
    """The times that a model's first block has run so far."""
    calls = []
    tiny_models.blocks(model)[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_logits_are_the_same_bit_for_bit(family, make_cache):
    model = tiny_models.FAMILIES[family]()
    ids = torch.cat([tiny_models.ids(32, seed=seed) for seed in range(3)])
    calls = counted(model)
    with inference(model):
        wanted = run(model, ids)
        first, second = (KeptBaseline(model, make_cache()).logits(ids) for _ in range(2))
        after = run(model, ids)  # the model is as it was
    assert torch.equal(first, wanted)
    assert torch.equal(second, wanted)
    assert torch.equal(after, wanted)
    # by hand, to be kept, by hand: not for what was kept; OPT's head passes its inner model by, so that it runs
    assert len(calls) == (4 if family == "opt" else 3)


def test_the_baseline_is_not_evaluated_twice(other, tokenizer, text, make_cache):
    baseline = tiny_models.FAMILIES["llama-gqa"]()
    calls = counted(baseline)
    without = evaluate(other, tokenizer, text, baseline=baseline, **OPTIONS)
    batches = len(calls)
    reports = []
    for runs in (2 * batches, 2 * batches):  # once for all later evaluations
        reports.append(
            evaluate(other, tokenizer, text, baseline=baseline, baseline_cache=make_cache(), **OPTIONS)
        )
        assert len(calls) == runs
    assert reports == [without, without]


def test_another_candidate_uses_what_was_kept(model, other, tokenizer, text, make_cache):
    baseline = tiny_models.FAMILIES["llama-gqa"]()
    evaluate(other, tokenizer, text, baseline=baseline, baseline_cache=make_cache(), **OPTIONS)
    calls = counted(baseline)
    found = evaluate(model, tokenizer, text, baseline=baseline, baseline_cache=make_cache(), **OPTIONS)
    assert calls == []
    assert found == evaluate(model, tokenizer, text, baseline=baseline, **OPTIONS)


def test_a_part_that_is_kept_and_a_part_that_runs_make_one_report(other, tokenizer, text, make_cache):
    baseline = tiny_models.FAMILIES["llama-gqa"]()
    wanted = evaluate(other, tokenizer, text, baseline=baseline, **OPTIONS)
    limit = 3 * (2 * 32 * 4 * 64 + 500)  # three batches or so
    for _ in range(2):
        cache = make_cache(limit)
        assert evaluate(other, tokenizer, text, baseline=baseline, baseline_cache=cache, **OPTIONS) == wanted
    assert 0 < cache.found < cache.found + cache.missed


def test_damage_is_computed_again(other, tokenizer, text, make_cache):
    baseline = tiny_models.FAMILIES["llama-gqa"]()
    wanted = evaluate(other, tokenizer, text, baseline=baseline, baseline_cache=make_cache(), **OPTIONS)
    for file in make_cache().folder.iterdir():
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    cache = make_cache()
    assert evaluate(other, tokenizer, text, baseline=baseline, baseline_cache=cache, **OPTIONS) == wanted
    assert cache.found == 0


def test_a_model_whose_head_does_not_repeat_keeps_nothing(make_cache):
    model = tiny_models.FAMILIES["llama-gqa"]()
    model.lm_head.register_forward_hook(lambda module, given, out: out + len(noise.append(1) or noise))
    noise = []
    with inference(model):
        KeptBaseline(model, make_cache()).logits(tiny_models.ids(32))
    assert not make_cache().folder.exists()


def test_a_model_without_an_inner_one_just_runs(scripted, make_cache):
    model = scripted(lambda ids: torch.nn.functional.one_hot(ids, 128).float())
    ids = tiny_models.ids(8)
    assert torch.equal(KeptBaseline(model, make_cache()).logits(ids), run(model, ids))
    assert not make_cache().folder.exists()


def test_a_quantized_baseline_just_runs(make_cache):
    model = tiny_models.FAMILIES["llama-gqa"]()
    model.config.quantization_config = {"quant_method": "any"}
    with inference(model):
        KeptBaseline(model, make_cache()).logits(tiny_models.ids(8))
    assert not make_cache().folder.exists()


def test_whatever_decides_last_bits_is_in_the_fingerprint(monkeypatch):
    model = tiny_models.FAMILIES["llama-gqa"]()
    seen = {fingerprint(model)}
    assert seen == {fingerprint(tiny_models.FAMILIES["llama-gqa"]())}
    seen.add(fingerprint(tiny_models.FAMILIES["qwen3"]()))
    seen.add(fingerprint(tiny_models.FAMILIES["llama-gqa"]().bfloat16()))
    monkeypatch.setenv("MKL_CBWR", "another")
    seen.add(fingerprint(model))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        seen.add(fingerprint(model))
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(torch, "__version__", "0")
    seen.add(fingerprint(model))
    assert len(seen) == 6
