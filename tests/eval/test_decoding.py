"""A model evaluated through a key-value cache: what a token sees of the earlier ones is what the cache gives."""

import copy

import pytest
import tiny_models
import torch
from quantkit_eval import EvalError, evaluate
from quantkit_eval.windows import cut, tokenize
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

CONTEXT = 32
SHORT = {"context": CONTEXT, "max_tokens": 3 * CONTEXT}


class RoundedLayer(DynamicLayer):
    """Keeps keys and values to two significant bits: every entry is rounded once, when it comes."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(_rounded(keys), _rounded(values), *args, **kwargs)


class LateLayer(DynamicLayer):
    """Gives new entries exactly, and rounds them when the next ones come."""

    def update(self, keys, values, *args, **kwargs):
        if self.is_initialized and self.keys.numel():
            self.keys, self.values = _rounded(self.keys), _rounded(self.values)
        return super().update(keys, values, *args, **kwargs)


def _rounded(x):
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 4).round() / 4, exponent)


def factory(kind, **facts):
    def make():
        cache = DynamicCache()
        cache.layers = [kind() for _ in range(3)]
        vars(cache).update(facts)
        return cache

    return make


ROUNDED = factory(RoundedLayer, exact_chunk=None, description="two bits")
LATE = factory(LateLayer)


@torch.no_grad()
def by_hand(model, windows, make):
    """Mean fp64 cross entropy, one token at a time and one window at a time."""
    losses = []
    for window in windows:
        cache = make()
        logits = torch.cat(
            [
                model(input_ids=token[None, None], past_key_values=cache, use_cache=True).logits[0]
                for token in window.ids
            ]
        )
        losses.append(functional.cross_entropy(logits[:-1].double(), window.ids[1:], reduction="none").mean())
    return torch.stack(losses).mean().item()


def windows_of(tokenizer, text):
    return cut(tokenize(tokenizer, text.read_text()), CONTEXT)[:3]


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "gpt2"])
def test_an_exact_cache_changes_nothing(family, tokenizer, text):
    model = tiny_models.FAMILIES[family]()
    options = {"context": CONTEXT, "max_tokens": 2 * CONTEXT}
    plain = evaluate(model, tokenizer, text, **options)
    for step in (None, 5, CONTEXT):
        found = evaluate(
            model,
            tokenizer,
            text,
            **options,
            cache=lambda: DynamicCache(config=model.config),
            cache_step=step,
        )
        assert found.quantized.nll == pytest.approx(plain.quantized.nll, rel=1e-5)
        assert (found.cache, found.cache_step) == ("DynamicCache", step or 1)
    assert (plain.cache, plain.cache_step) == (None, None)


@pytest.mark.parametrize("step", [None, 1, 7])
def test_entries_rounded_as_they_come_give_one_result_for_every_chunk(model, tokenizer, text, step):
    expected = by_hand(model, windows_of(tokenizer, text), ROUNDED)
    found = evaluate(model, tokenizer, text, **SHORT, cache=ROUNDED, cache_step=step)
    assert found.quantized.nll == pytest.approx(expected, rel=1e-5)
    assert (found.cache, found.cache_step) == ("two bits", step)
    exact = evaluate(model, tokenizer, text, **SHORT).quantized.nll
    assert abs(expected - exact) > 1e-4


def test_a_cache_that_rounds_late_is_filled_token_by_token(model, tokenizer, text):
    """At once it would show no rounding at all."""
    expected = by_hand(model, windows_of(tokenizer, text), LATE)
    found = evaluate(model, tokenizer, text, **SHORT, cache=LATE)
    assert found.cache_step == 1
    assert found.quantized.nll == pytest.approx(expected, rel=1e-5)
    at_once = evaluate(model, tokenizer, text, **SHORT, cache=LATE, cache_step=CONTEXT)
    exact = evaluate(model, tokenizer, text, **SHORT)
    assert at_once.quantized.nll == pytest.approx(exact.quantized.nll, rel=1e-6)
    assert abs(expected - exact.quantized.nll) > 1e-4


def test_the_baseline_runs_without_the_cache(model, tokenizer, text):
    options = {"context": CONTEXT, "cache": ROUNDED}
    found = evaluate(model, tokenizer, text, baseline=model, **options)
    assert found.original == evaluate(model, tokenizer, text, context=CONTEXT).quantized
    assert found.quantized == evaluate(model, tokenizer, text, **options).quantized
    assert found.kl_mean > 0
    early = evaluate(
        model, tokenizer, [text] * 4, baseline=copy.deepcopy(model), batch_size=4, kl_error=0.5, **options
    )
    assert early.stopped_early


def test_a_model_that_ignores_the_cache_is_told(tokenizer, text, scripted):
    flat = scripted(lambda ids: torch.zeros(*ids.shape, 128))
    with pytest.raises(EvalError, match=r"given a cache of type DynamicCache and returned tuple"):
        evaluate(flat, tokenizer, text, context=CONTEXT, cache=ROUNDED)


@pytest.mark.parametrize("step", [0, -1, 1.5, True])
def test_a_step_out_of_range_is_told(model, tokenizer, text, step):
    with pytest.raises(EvalError, match="cache_step must be at least 1"):
        evaluate(model, tokenizer, text, context=CONTEXT, cache=ROUNDED, cache_step=step)
