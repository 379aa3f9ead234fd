"""The whole evaluation against plain PyTorch on the same windows."""

import copy
import hashlib
import json
import math

import pytest
import tiny_models
import torch
from quantkit_eval import EvalError, evaluate, measure
from quantkit_eval.errors import BrokenModel
from quantkit_eval.windows import cut, tokenize
from torch.nn import functional

CONTEXT = 32


def windows_of(tokenizer, text, **keywords):
    return cut(tokenize(tokenizer, text.read_text()), CONTEXT, **keywords)


@torch.no_grad()
def by_hand(model, windows):
    """fp64 cross entropy of each window's scored tokens."""
    losses = []
    for window in windows:
        logits = model(input_ids=window.ids[None]).logits[0, -window.scored - 1 : -1]
        losses.append(
            functional.cross_entropy(logits.double(), window.ids[-window.scored :], reduction="none")
        )
    return losses


def test_perplexity_is_the_exponential_of_cross_entropy(model, tokenizer, text):
    losses = torch.stack(by_hand(model, windows_of(tokenizer, text)))
    found = evaluate(model, tokenizer, text, context=CONTEXT)
    assert (found.windows, found.tokens) == (len(losses), losses.numel())
    assert found.windows > 5
    assert found.quantized.nll == pytest.approx(losses.mean().item(), rel=1e-6)
    assert found.quantized.perplexity == pytest.approx(math.exp(losses.mean().item()), rel=1e-6)
    over_windows = losses.mean(1).std().item() / math.sqrt(len(losses))
    assert found.quantized.nll_se == pytest.approx(over_windows, rel=1e-5)
    assert found.quantized.perplexity_se == pytest.approx(found.quantized.perplexity * over_windows, rel=1e-5)


def test_a_model_scored_by_transformers_has_the_same_loss(model, tokenizer, text):
    window = windows_of(tokenizer, text)[0]
    with torch.no_grad():
        loss = model(input_ids=window.ids[None], labels=window.ids[None]).loss.item()
    found = evaluate(model, tokenizer, text, context=CONTEXT, max_tokens=CONTEXT)
    assert found.quantized.nll == pytest.approx(loss, rel=1e-5)
    assert found.quantized.nll_se is None


def test_strided_windows_weigh_every_token_alike(model, tokenizer, text):
    losses = by_hand(model, windows_of(tokenizer, text, stride=12))
    found = evaluate(model, tokenizer, text, context=CONTEXT, stride=12)
    whole = torch.cat(losses)
    assert (found.tokens, found.stride) == (len(whole), 12)
    assert found.quantized.nll == pytest.approx(whole.mean().item(), rel=1e-6)


def test_a_tokenizer_with_bos_scores_every_token(model, with_bos, tokenizer, text):
    windows = windows_of(tokenizer, text, bos=tokenizer.bos_token_id)
    found = evaluate(model, with_bos, text, context=CONTEXT)
    assert found.tokens == (CONTEXT - 1) * found.windows
    expected = torch.cat(by_hand(model, windows)).mean().item()
    assert found.quantized.nll == pytest.approx(expected, rel=1e-6)
    assert found.quantized.nll != evaluate(model, tokenizer, text, context=CONTEXT).quantized.nll


def test_a_model_does_not_differ_from_itself(model, tokenizer, text):
    found = evaluate(model, tokenizer, text, baseline=copy.deepcopy(model), context=CONTEXT)
    assert found.quantized == found.original
    assert (found.delta_nll, found.delta_nll_se) == (0, 0)
    assert (found.kl_mean, found.kl_median, found.kl_max) == (0, 0, 0)
    assert (found.top1_agreement, found.top1_agreement_se) == (1, 0)


@torch.no_grad()
def test_the_comparison_is_that_of_plain_torch(model, other, tokenizer, text):
    windows = windows_of(tokenizer, text)
    found = evaluate(other, tokenizer, text, baseline=model, context=CONTEXT)
    ids = torch.stack([w.ids for w in windows])
    ours, base = (m(input_ids=ids).logits[:, :-1].double() for m in (other, model))
    kl = functional.kl_div(ours.log_softmax(-1), base.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.kl_mean_se == pytest.approx((kl.mean(1).std() / math.sqrt(len(kl))).item(), rel=1e-4)
    assert found.kl_max == pytest.approx(kl.max().item(), rel=1e-5)
    assert found.kl_median == pytest.approx(kl.median().item(), rel=1e-5)
    agreement = (ours.argmax(-1) == base.argmax(-1)).double()
    assert found.top1_agreement == pytest.approx(agreement.mean().item())
    assert 0 < found.top1_agreement < 1

    losses = [torch.stack(by_hand(m, windows)).mean(1) for m in (other, model)]
    difference = losses[0] - losses[1]
    assert found.delta_nll == pytest.approx(difference.mean().item(), rel=1e-4)
    assert found.delta_nll_se == pytest.approx(
        (difference.std() / math.sqrt(len(difference))).item(), rel=1e-4
    )
    assert found.delta_nll == pytest.approx(found.quantized.nll - found.original.nll)
    assert found.original.nll == pytest.approx(losses[1].mean().item(), rel=1e-6)


def test_the_paired_error_is_smaller_than_that_of_either(model, tokenizer, text):
    near = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter *= 1.01
    found = evaluate(near, tokenizer, text, baseline=model, context=CONTEXT)
    assert 0 < found.delta_nll_se < 0.3 * min(found.quantized.nll_se, found.original.nll_se)


def test_results_do_not_depend_on_chunks_and_hardly_on_batches(model, other, tokenizer, text, monkeypatch):
    def run(**keywords):
        return evaluate(
            other, tokenizer, text, baseline=model, context=CONTEXT, stride=20, **keywords
        ).to_json()

    whole = run()
    for size in (1, 3, 100):
        batched = run(batch_size=size)
        assert batched["kl_mean"] == pytest.approx(whole["kl_mean"], rel=1e-4)
        assert batched["quantized"]["nll"] == pytest.approx(whole["quantized"]["nll"], rel=1e-6)
    monkeypatch.setattr("quantkit_eval.windows._CHUNK_LOGITS", 128 * 7)  # 7 tokens; 19 and 20 are scored
    chunked = run()
    assert chunked["kl_mean"] == pytest.approx(whole["kl_mean"], rel=1e-6)
    assert chunked["quantized"]["nll"] == pytest.approx(whole["quantized"]["nll"], rel=1e-6)
    assert chunked["tokens"] == whole["tokens"]


def test_a_window_of_a_huge_vocabulary_goes_alone(model, tokenizer, text, scripted, monkeypatch):
    monkeypatch.setattr(measure, "_BATCH_LOGITS", 128 * CONTEXT * 2)
    flat = scripted(lambda ids: torch.zeros(*ids.shape, 128))
    evaluate(flat, tokenizer, text, context=CONTEXT)
    assert {len(ids) for ids in flat.calls[:-1]} == {2}
    monkeypatch.setattr(measure, "_BATCH_LOGITS", 1)
    flat = scripted(lambda ids: torch.zeros(*ids.shape, 128))
    assert evaluate(flat, tokenizer, text, context=CONTEXT).quantized.perplexity == pytest.approx(128)
    assert {len(ids) for ids in flat.calls} == {1}


def test_kl_of_some_windows_leaves_the_rest_as_it_was(model, other, tokenizer, text):
    every = evaluate(other, tokenizer, text, baseline=model, context=CONTEXT)
    some = evaluate(other, tokenizer, text, baseline=model, context=CONTEXT, kl_windows=2)
    first = evaluate(other, tokenizer, text, baseline=model, context=CONTEXT, max_tokens=2 * CONTEXT)
    assert (some.quantized, some.original, some.delta_nll) == (
        every.quantized,
        every.original,
        every.delta_nll,
    )
    assert (some.kl_windows, every.kl_windows) == (2, every.windows)
    assert some.kl_mean == pytest.approx(first.kl_mean, rel=1e-5)
    assert some.top1_agreement == first.top1_agreement


@pytest.fixture(scope="module")
def long_text(tmp_path_factory, text):
    """About 50 windows."""
    path = tmp_path_factory.mktemp("long") / "long.txt"
    path.write_text(text.read_text() * 5)
    return path


def test_an_evaluation_stops_once_the_kl_is_known(model, other, tokenizer, long_text):
    options = {"baseline": model, "context": CONTEXT, "batch_size": 4}
    every = evaluate(other, tokenizer, long_text, **options)
    share = 1.2 * every.kl_mean_se / every.kl_mean
    early = evaluate(other, tokenizer, long_text, **options, kl_error=share)
    assert measure.LEAST_WINDOWS <= early.windows < every.windows
    assert early.kl_mean_se <= share * early.kl_mean
    assert (early.stopped_early, every.stopped_early) == (True, False)
    same = evaluate(other, tokenizer, long_text, **options, max_tokens=early.windows * CONTEXT)
    numbers = {"max_tokens": None, "stopped_early": False}
    assert same.to_json() | numbers == early.to_json() | numbers


def test_an_evaluation_goes_to_the_end_while_the_kl_is_not_known(model, other, tokenizer, long_text):
    found = evaluate(other, tokenizer, long_text, baseline=model, context=CONTEXT, kl_error=1e-6)
    every = evaluate(other, tokenizer, long_text, baseline=model, context=CONTEXT)
    assert found == every


def test_a_few_windows_never_stop_an_evaluation(model, tokenizer, text):
    """The spread of two or three windows says little; a model that equals its baseline has none at all."""
    found = evaluate(model, tokenizer, text, baseline=model, context=CONTEXT, kl_error=0.5, batch_size=1)
    assert found.windows < measure.LEAST_WINDOWS
    assert not found.stopped_early


def test_half_precision_is_compared_in_fp32(model, tokenizer, text):
    half = copy.deepcopy(model).to(torch.bfloat16)
    windows = windows_of(tokenizer, text)
    found = evaluate(half, tokenizer, text, baseline=model, context=CONTEXT, batch_size=1)
    expected = torch.cat(by_hand(half, windows)).mean().item()
    assert found.quantized.nll == pytest.approx(expected, rel=1e-6)
    assert 0 < found.kl_mean < 0.01
    assert next(half.parameters()).dtype == torch.bfloat16


def test_the_model_is_left_as_it_was(model, tokenizer, text):
    noisy = tiny_models.FAMILIES["llama-gqa"](attention_dropout=0.5)
    noisy.train()
    noisy.lm_head.eval()
    state = torch.get_rng_state()
    found = evaluate(noisy, tokenizer, text, context=CONTEXT)
    assert found.quantized == evaluate(model, tokenizer, text, context=CONTEXT).quantized
    assert noisy.model.training
    assert not noisy.lm_head.training
    assert torch.equal(state, torch.get_rng_state())


def test_progress_counts_windows(model, tokenizer, text):
    seen = []
    windows = evaluate(
        model, tokenizer, text, context=CONTEXT, batch_size=4, progress=lambda *now: seen.append(now)
    ).windows
    assert seen == [(min(n, windows), windows) for n in range(4, windows + 4, 4)]


def test_the_report_says_what_was_read(model, tokenizer, text):
    found = evaluate(model, tokenizer, [text, str(text)], context=CONTEXT).to_json()
    twice = text.read_text() + "\n\n" + text.read_text()
    assert found["text"] == ["text.txt", "text.txt"]
    assert found["text_sha256"] == hashlib.sha256(twice.encode()).hexdigest()
    assert (found["context"], found["stride"]) == (CONTEXT, CONTEXT)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("broken", ["model", "baseline"])
def test_logits_that_are_not_finite_are_told_with_window_and_model(tokenizer, text, scripted, bad, broken):
    def logits(ids):
        out = torch.zeros(*ids.shape, 128)
        if len(made.calls) == 3:  # the third window, one to a batch
            out[0, 5, 7] = bad
        return out

    made = scripted(logits)
    fine = scripted(lambda ids: torch.zeros(*ids.shape, 128))
    pair = (made, fine) if broken == "model" else (fine, made)
    with pytest.raises(EvalError, match=f"the {broken} gives non-finite logits in window 2"):
        evaluate(pair[0], tokenizer, text, baseline=pair[1], context=CONTEXT, batch_size=1)


def test_different_vocabularies_are_refused(model, tokenizer, text):
    wider = tiny_models.FAMILIES["llama-gqa"](vocab_size=160)
    with pytest.raises(EvalError, match="vocabularies differ: 160 tokens in the model, 128 in the baseline"):
        evaluate(wider, tokenizer, text, baseline=model, context=CONTEXT)


def test_tokens_beyond_the_vocabulary_are_refused(tokenizer, text):
    narrow = tiny_models.FAMILIES["llama-gqa"](vocab_size=32)
    with pytest.raises(EvalError, match=r"the tokenizer gives token \d+, the model has 32"):
        evaluate(narrow, tokenizer, text, context=CONTEXT)


def test_tokenizers_that_differ_are_refused(model, tokenizer, with_bos, text):
    def run(baseline_tokenizer):
        return evaluate(
            model, tokenizer, text, baseline=model, context=CONTEXT, baseline_tokenizer=baseline_tokenizer
        )

    assert run(tiny_models.tokenizer()).delta_nll == 0
    with pytest.raises(EvalError, match="tokenize the text differently"):
        run(with_bos)


@pytest.mark.parametrize(
    ("keywords", "told"),
    [
        ({"context": 500}, "context 500 is beyond the model's 128"),
        ({"context": 32, "stride": 33}, "stride"),
        ({"max_tokens": 20}, "max_tokens 20 is less than one window of 128"),
        ({"kl_windows": 0}, "kl_windows must be at least 1"),
        ({"kl_error": 0.0}, "kl_error must be above 0"),
        ({"kl_error": math.nan}, "kl_error must be above 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_options_out_of_range_are_told(model, tokenizer, text, keywords, told):
    with pytest.raises(EvalError, match=told):
        evaluate(model, tokenizer, text, **keywords)


def test_a_short_text_is_told_with_both_numbers(model, tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a" * 20)
    with pytest.raises(EvalError, match="the text has 20 tokens, one window needs 128"):
        evaluate(model, tokenizer, path)


def test_a_divergence_that_is_no_number_is_told_not_reported(tokenizer, text, scripted):
    """Finite logits so far apart that fp32 has no difference of them: the loss is finite, the KL is not."""

    def far(ids):
        logits = torch.zeros(*ids.shape, 128)
        logits[..., 0] = -3e38
        return logits + torch.nn.functional.one_hot(torch.ones_like(ids), 128) * 3e38

    near = scripted(lambda ids: torch.zeros(*ids.shape, 128))
    path = text.with_name("ones.txt")
    path.write_text(tokenizer.decode([1]) * 200)
    with pytest.raises(BrokenModel, match=r"kl_\w+ is (nan|inf)"):
        evaluate(scripted(far), tokenizer, path, baseline=near, context=CONTEXT)
