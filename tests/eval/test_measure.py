"""Evaluation against hand computations on a tiny random model."""

import math

import pytest
import tiny_models
import torch
from quantkit_eval import EvalError, evaluate, generate_stream
from quantkit_eval.measure import ratio
from quantkit_eval.windows import cut


class Characters:
    """One token per character; with or without a BOS of its own."""

    bos_token_id = 1

    def __init__(self, adds_bos=False):
        self.adds_bos = adds_bos

    def __call__(self, text, add_special_tokens=True, verbose=True, return_tensors=None):
        ids = [3 + ord(c) % 90 for c in text]
        ids = [1, *ids] if self.adds_bos and add_special_tokens else ids
        found = type("Encoding", (), {})()
        found.input_ids = torch.tensor([ids]) if return_tensors else ids
        return found

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    model = tiny_models.FAMILIES["llama-gqa"]().float()
    other = tiny_models.FAMILIES["llama-gqa"]().float()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.02)
    return model, other


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(97 + (7 * i + i // 5) % 26) for i in range(400)))
    return file


def test_perplexity_equals_cross_entropy(models, text):
    report = evaluate(models[0], Characters(), text, context=20)
    ids = torch.tensor(Characters()(text.read_text()).input_ids).view(-1, 20)
    with torch.no_grad():
        logits = models[0](ids).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="none"
    ).view(20, 19)
    assert report.tokens == 380
    assert report.quantized.nll == pytest.approx(float(losses.mean()), rel=1e-6)
    assert report.quantized.perplexity == pytest.approx(math.exp(float(losses.mean())), rel=1e-6)
    by_window = losses.mean(1)
    assert report.quantized.nll_se == pytest.approx(float(by_window.std() / 20**0.5), rel=1e-6)


def test_kl_equals_fp64(models, text):
    report = evaluate(models[0], Characters(), text, baseline=models[1], context=20, kl_windows=7)
    ids = torch.tensor(Characters()(text.read_text()).input_ids).view(-1, 20)[:7]
    with torch.no_grad():
        p = models[1](ids).logits[:, :-1].double().log_softmax(-1)
        q = models[0](ids).logits[:, :-1].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert report.kl_windows == 7
    assert report.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert report.kl_median == pytest.approx(float(kl.flatten().median()), rel=1e-3)
    assert report.kl_max == pytest.approx(float(kl.max()), rel=1e-3)
    assert report.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert report.kl_mean > 1e-6


def test_model_against_itself(models, text):
    report = evaluate(models[0], Characters(), text, baseline=models[0], context=20)
    assert report.kl_mean == pytest.approx(0, abs=1e-9)
    assert (report.delta_nll, report.delta_nll_se, report.top1_agreement) == (0, 0, 1)


def test_batches_and_chunks_change_nothing(models, text, monkeypatch):
    whole = evaluate(models[0], Characters(), text, baseline=models[1], context=20)
    monkeypatch.setattr("quantkit_eval.measure._LOGIT_ELEMENTS", 300)
    parts = evaluate(models[0], Characters(), text, baseline=models[1], context=20, batch_size=3)
    assert parts.quantized.nll == pytest.approx(whole.quantized.nll, rel=1e-6)
    assert parts.kl_mean == pytest.approx(whole.kl_mean, rel=1e-4)


def test_paired_error_is_smaller_than_unpaired(models, text):
    report = evaluate(models[0], Characters(), text, baseline=models[1], context=20)
    assert report.delta_nll == pytest.approx(report.quantized.nll - report.original.nll)
    assert report.delta_nll_se < report.quantized.nll_se


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(("context", "stride"), [(10, None), (10, 4), (10, 1), (7, 7)])
def test_each_token_is_scored_once(bos, context, stride):
    ids = list(range(100, 163))
    scored = [i for w in cut(ids, context, stride, bos) for i in w.ids[-w.scored :].tolist()]
    assert len(scored) == len(set(scored))
    assert all(len(w.ids) == context for w in cut(ids, context, stride, bos))
    if stride in (4, 1):  # only the very first token has nothing to be predicted from
        assert scored == ids[(bos is None) :][: len(scored)]


def test_windows_begin_with_bos(models, text):
    report = evaluate(models[0], Characters(adds_bos=True), text, context=20)
    assert report.tokens == 19 * (400 // 19)


def test_standard_error_of_a_ratio():
    sums, counts = torch.tensor([3.0, 5.0, 4.0]), torch.tensor([2.0, 2.0, 2.0])
    value, se = ratio(sums.double(), counts.double())
    assert value == pytest.approx(2.0)
    assert se == pytest.approx(float((sums / 2).std()) / 3**0.5)
    assert ratio(sums[:1], counts[:1])[1] is None


def test_what_cannot_be_evaluated(models, text, tmp_path):
    model = models[0]
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(EvalError, match="3 tokens, one window needs 20"):
        evaluate(model, Characters(), tmp_path / "short.txt", context=20)
    with pytest.raises(EvalError, match="holds no text"):
        evaluate(model, Characters(), tmp_path / "empty.txt", context=20)
    with pytest.raises(EvalError, match="not UTF-8"):
        evaluate(model, Characters(), tmp_path / "latin.txt", context=20)
    with pytest.raises(EvalError, match="no evaluation text"):
        evaluate(model, Characters(), tmp_path / "missing.txt", context=20)
    with pytest.raises(EvalError, match="context must be"):
        evaluate(model, Characters(), text, context=10**6)
    other = tiny_models.FAMILIES["llama-gqa"](vocab_size=256)
    with pytest.raises(EvalError, match="vocabularies differ"):
        evaluate(model, Characters(), text, baseline=other, context=20)


def test_non_finite_logits_name_the_window(text):
    broken = tiny_models.FAMILIES["llama-gqa"]()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(EvalError, match="window 0"):
        evaluate(broken, Characters(), text, context=20)


def test_a_local_dataset_folder_is_read(models, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"text": "abcdefghij klmnop"}\n{"text": "qrstuvwxyz abcd"}\n')
    report = evaluate(models[0], Characters(), folder, context=16)
    assert report.windows == 2


def test_greedy_generation_equals_generate(models):
    model = models[0]
    pieces = []
    state = torch.random.get_rng_state()
    done = generate_stream(model, Characters(), "hello", max_new_tokens=12, write=pieces.append)
    ids = Characters()("hello", return_tensors="pt").input_ids
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert done.text == "".join(pieces) == Characters().decode(wanted[0, 5:].tolist())[: len(done.text)]
    assert (done.prompt_tokens, done.new_tokens) == (5, len(done.text))
    sampled = [
        generate_stream(model, Characters(), "hello", 8, temperature=1.0, top_k=9, seed=s).text
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1]
    assert torch.equal(state, torch.random.get_rng_state())
