"""Explanations: the tokens with the largest KL, and the exact effect of a part that is restored."""

import math
from contextlib import contextmanager

import pytest
import torch
from quantkit_eval import EvalError, Seen, evaluate, explain
from quantkit_eval.attribution import CACHE, TOKENS
from quantkit_eval.divergence import token_kl
from quantkit_eval.errors import BrokenModel

CONTEXT = 16
PARTS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture
def seen(model, other, tokenizer, text):
    found = Seen()
    report = evaluate(other, tokenizer, text, baseline=model, context=CONTEXT, seen=found)
    assert report.kl_windows == len(found.kl) == len(found.windows)
    assert float(torch.cat(found.kl).max()) == report.kl_max
    return found


def lent(other, model, names, log=None):
    """What puts modules of `model` into `other` for a while."""

    @contextmanager
    def restore():
        own = {name: other.get_submodule(name) for name in names}
        for name in names:
            other.set_submodule(name, model.get_submodule(name))
        if log is not None:
            log.append(names)
        try:
            yield
        finally:
            for name, module in own.items():
                other.set_submodule(name, module)

    return restore


@torch.no_grad()
def kl(model, other, window):
    """KL of each scored token, from the definition."""
    base, ours = (m(input_ids=window.ids[None]).logits[0, :-1].log_softmax(-1) for m in (model, other))
    return token_kl(base, ours)[-window.scored :]


def test_the_worst_tokens_come_first_with_their_own_text(model, other, tokenizer, seen):
    found = explain(other, model, tokenizer, seen)
    everything = torch.cat(seen.kl)
    assert [t.kl for t in found.worst] == everything.sort(descending=True).values[:TOKENS].tolist()
    assert found.restored == []
    assert found.kl_mean is None
    for token in found.worst:
        window = seen.windows[token.window]
        ids = window.ids.tolist()
        assert token.before == tokenizer.decode(ids[: token.position])
        shown = token.before + token.text + token.after
        assert tokenizer.decode(ids).startswith(shown)
        own = kl(model, other, window)[token.position - (CONTEXT - window.scored)]
        torch.testing.assert_close(torch.tensor(token.kl), own)
        assert [g.probability for g in token.model] == sorted(
            (g.probability for g in token.model), reverse=True
        )
        assert (
            token.loss >= -math.log(token.model[0].probability) - 1e-5
        )  # none is likelier than the first guess


def test_every_token_is_in_one_bin_of_the_histogram(model, other, tokenizer, seen):
    found = explain(other, model, tokenizer, seen)
    everything = torch.cat(seen.kl)
    assert sum(found.kl_counts) == found.tokens == len(everything)
    edges = torch.tensor(found.kl_edges, dtype=torch.float64)
    inside = (everything >= edges[0]) & (everything < edges[-1])
    assert inside.all()
    expected = torch.histogram(everything.double(), edges).hist.long().tolist()
    assert found.kl_counts == expected
    assert found.quantiles["1.0"] == float(everything.max())
    assert float((everything <= found.quantiles["0.5"]).float().mean()) >= 0.5


def test_effects_are_those_of_the_model_with_that_part_restored(model, other, tokenizer, seen):
    units = {name: lent(other, model, [name]) for name in PARTS}
    found = explain(other, model, tokenizer, seen, units, "layer", windows=2)
    assert found.by == "layer"
    assert len(found.windows) == 2
    assert {each.window for each in found.worst[:1]} <= set(found.windows)
    whole = torch.cat([seen.kl[w] for w in found.windows]).double().mean()
    assert found.kl_mean == pytest.approx(float(whole))
    for each in found.restored:
        with units[each.unit]():
            own = torch.cat([kl(model, other, seen.windows[w]) for w in found.windows]).double().mean()
        assert each.kl_mean == pytest.approx(float(own), rel=1e-4)
        assert each.removed == found.kl_mean - each.kl_mean
    assert [e.removed for e in found.restored] == sorted((e.removed for e in found.restored), reverse=True)
    for token in found.worst:
        if token.window in found.windows:
            restored = {}
            for name in PARTS:
                with units[name]():
                    place = token.position - CONTEXT
                    restored[name] = float(kl(model, other, seen.windows[token.window])[place])
            assert token.unit == min(restored, key=restored.get)
            assert token.kl_restored == pytest.approx(min(restored.values()), rel=1e-3, abs=1e-6)
        else:
            assert token.unit is None


def test_nothing_is_left_with_everything_restored_and_all_goes_back(model, other, tokenizer, seen):
    before = {name: module for name, module in other.named_modules() if name}
    names = [name for name, _ in model.named_children()]
    found = explain(other, model, tokenizer, seen, {"all": lent(other, model, names)}, windows=1)
    assert found.kl_all_restored == pytest.approx(0, abs=1e-7)
    assert found.restored[0].removed == pytest.approx(found.kl_mean)
    assert dict(other.named_modules()).keys() - {""} == before.keys()
    assert all(other.get_submodule(name) is module for name, module in before.items())


def test_a_part_goes_back_after_an_error(model, other, tokenizer, seen):
    own = other.get_submodule(PARTS[0])

    @contextmanager
    def broken():
        raise RuntimeError("no")
        yield

    units = {"first": lent(other, model, [PARTS[0]]), "broken": broken}
    with pytest.raises(RuntimeError, match="no"):
        explain(other, model, tokenizer, seen, units, windows=1)
    assert other.get_submodule(PARTS[0]) is own


def test_without_a_baseline_there_is_nothing_to_explain(model, other, tokenizer, text):
    seen = Seen()
    evaluate(other, tokenizer, text, context=CONTEXT, seen=seen)
    for empty in (Seen(), seen):
        with pytest.raises(EvalError, match="nothing to explain: evaluate with a baseline"):
            explain(other, model, tokenizer, empty)


def test_a_part_that_breaks_the_model_is_told(model, other, tokenizer, seen):
    @contextmanager
    def broken():
        head = other.lm_head.weight.data
        own = head.clone()
        head.fill_(torch.nan)
        yield
        head.copy_(own)

    with pytest.raises(BrokenModel, match=r"the model gives non-finite logits in window \d+"):
        explain(other, model, tokenizer, seen, {"broken": broken}, windows=1)


def test_a_cache_is_one_more_unit(model, tokenizer, text):
    """The model itself with a cache that spoils the values: without the cache nothing is left."""
    from transformers import DynamicCache

    class Coarse(DynamicCache):
        exact_chunk = None

        def update(self, keys, values, *args, **options):
            return super().update(keys, (values * 2).round() / 2, *args, **options)

    seen = Seen()
    evaluate(model, tokenizer, text, baseline=model, context=CONTEXT, seen=seen, cache=Coarse)
    found = explain(model, model, tokenizer, seen, cache=Coarse, windows=1)
    assert found.kl_mean > 1e-4
    assert [each.unit for each in found.restored] == [CACHE]
    assert found.restored[0].kl_mean == pytest.approx(0, abs=1e-7)
    assert found.kl_all_restored == pytest.approx(0, abs=1e-7)
