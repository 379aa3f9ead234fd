"""Tasks of lm-eval from local files: every item scored as by hand, whatever runs the model, and models compared."""

import json
import random
from importlib.util import find_spec

import pytest
import torch
from quantkit_eval import EvalError, TaskReport, run_tasks
from quantkit_eval.mcnemar import mcnemar
from quantkit_eval.tasks import check_tasks
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

pytestmark = [
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed"),
    pytest.mark.filterwarnings("default"),  # the harness's own
]
ITEMS = [
    {"question": f"{a} and {b}", "choices": [str(a + b), str(a * b), "no way"], "answer": (a + b) % 3}
    for a in range(2, 8)
    for b in (3, 5)
]
CHOICE = """
doc_to_text: "{{question}} is:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
output_type: multiple_choice
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{question}} or {{choices[0]}}"
output_type: loglikelihood_rolling
metric_list: [{metric: byte_perplexity}]
"""
WRITTEN = """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
output_type: generate_until
generation_kwargs: {until: ["?", "qq"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: !function own.length, aggregation: mean, higher_is_better: true}]
"""
GROUP = """
group: both
task: [first, second]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


class Decoder:
    """A decoder that runs one sequence and can forget its end; `ran` counts the tokens it was given."""

    def __init__(self, model):
        self.model, self.config, self.device, self.ran = model, model.config, model.device, 0

    def start(self):
        return Sequence(self)

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        self.ran += input_ids.shape[1]
        cache = DynamicCache() if past_key_values is None else past_key_values
        return self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)

    __call__ = forward

    def modules(self):
        return iter(())


class Sequence:
    def __init__(self, decoder):
        self.decoder, self.cache = decoder, DynamicCache()

    def append(self, tokens, keep=1):
        return self.decoder(tokens[None], self.cache).logits[0, -keep:]

    def truncate(self, length):
        if length < self.cache.get_seq_length():
            self.cache.crop(length - self.cache.get_seq_length())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """YAML tasks `first`, `second`, `both`, `rolling` and `written`."""
    found = tmp_path_factory.mktemp("tasks")
    (found / "own.py").write_text("def length(predictions, references, **more): return len(predictions[0])\n")
    for name, lines, body in (
        ("first", ITEMS[:8], CHOICE),
        ("second", ITEMS[8:], CHOICE),
        ("rolling", ITEMS, ROLLING),
        ("written", ITEMS[:3], WRITTEN),
    ):
        data = found / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        head = f"task: {name}\ndataset_path: json\ntest_split: test\nmetadata: {{version: 2}}\n"
        kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(found / "cache")}
        (found / f"{name}.yaml").write_text(head + f"dataset_kwargs: {json.dumps(kwargs)}\n" + body)
    (found / "both.yaml").write_text(GROUP)
    return found


@torch.no_grad()
def likelihood(model, tokenizer, before, after):
    """Sum of log-probabilities of the characters of `after`."""
    ids = tokenizer(before + after, add_special_tokens=False, return_tensors="pt")["input_ids"]
    log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(float(log_p[i - 1, ids[0, i]]) for i in range(len(before), ids.shape[1]))


def by_hand(model, tokenizer, items):
    """1 for each item whose likeliest choice is right."""
    best = []
    for item in items:
        scores = [likelihood(model, tokenizer, f"{item['question']} is:", f" {c}") for c in item["choices"]]
        best.append(float(scores.index(max(scores)) == item["answer"]))
    return best


@pytest.mark.parametrize("decoded", [False, True])
def test_choices_are_scored_as_by_hand(model, tokenizer, folder, decoded):
    decoder = Decoder(model) if decoded else None
    told = []
    report = run_tasks(
        model,
        tokenizer,
        ["first"],
        folder,
        decoder=decoder,
        batch_size=3,
        progress=lambda *now: told.append(now),
    )
    (task,) = report.tasks
    (score,) = task.scores
    assert score.outcomes == by_hand(model, tokenizer, ITEMS[:8])
    assert (score.metric, score.kind, score.higher_is_better) == ("acc", "binary", True)
    assert score.value == pytest.approx(sum(score.outcomes) / 8)
    assert (task.version, task.fewshot, task.documents, len(set(task.items))) == ("2", 0, 8, 8)
    assert report.ran == ("native" if decoded else "transformers")
    assert told[-1] == (24, 24)
    if decoded:  # 8 questions of 11 or 12 characters in front of 3 choices each
        tokens = sum(len(i["question"]) + 4 + len(c) for i in ITEMS[:8] for c in i["choices"])
        assert decoder.ran < tokens / 2


def test_models_are_compared_item_by_item(model, other, tokenizer, folder):
    report, base = (
        run_tasks(m, tokenizer, ["both"], folder, name=n) for m, n in ((other, "moved"), (model, "base"))
    )
    both = report.against(TaskReport.from_json(json.loads(json.dumps(base.to_json(), allow_nan=False))))
    ours, theirs = (by_hand(m, tokenizer, ITEMS) for m in (other, model))
    gained = sum(a > b for a, b in zip(ours, theirs, strict=True))
    lost = sum(a < b for a, b in zip(ours, theirs, strict=True))
    assert gained + lost > 0
    assert [c.task for c in both.comparisons] == ["first", "second", "both"]
    whole = both.comparisons[-1]
    assert (whole.items, whole.gained, whole.lost) == (12, gained, lost)
    assert (whole.p_exact, whole.p_mid) == (mcnemar(gained, lost).p_exact, mcnemar(gained, lost).p_mid)
    difference = torch.tensor(ours) - torch.tensor(theirs)
    assert whole.difference == pytest.approx(float(difference.mean()))
    assert whole.difference_se == pytest.approx(float(difference.std()) / 12**0.5)
    (group,) = both.groups
    assert (group.name, group.tasks) == ("both", ["first", "second"])
    assert group.value == pytest.approx(sum(ours) / 12)
    assert both.baseline == base
    assert TaskReport.from_json(both.to_json()) == both


def test_texts_are_compared_by_their_likelihood(model, other, tokenizer, folder):
    reports = [
        run_tasks(m, tokenizer, ["rolling"], folder, decoder=d)
        for m, d in ((other, Decoder(other)), (model, None))
    ]
    texts = [f"{item['question']} or {item['choices'][0]}" for item in ITEMS]
    scores = [report.tasks[0].scores[0] for report in reports]
    assert [score.kind for score in scores] == ["rate", "rate"]
    units = [len(text) for text in texts]
    for m, score in zip((other, model), scores, strict=True):
        assert [pair[1] for pair in score.outcomes] == units
        assert [pair[0] for pair in score.outcomes] == pytest.approx(
            [rolled(m, tokenizer, t) for t in texts], rel=1e-4
        )
    (found,) = reports[0].against(reports[1]).comparisons
    log = [torch.tensor(score.value).log() for score in scores]
    assert found.difference == pytest.approx(float(log[0] - log[1]), abs=1e-5)
    assert found.difference_se > 0
    assert found.p_mid is None


@torch.no_grad()
def rolled(model, tokenizer, text):
    """Log-likelihood of a text after BOS."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    log_p = model(input_ids=torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0].log_softmax(-1)
    return float(log_p[torch.arange(len(ids)), torch.tensor(ids)].sum())


class Halved(DynamicLayer):
    """A cache that keeps half of each value."""

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys, values / 2, *args, **kwargs)


def halved():
    cache = DynamicCache()
    cache.layers = [Halved() for _ in range(3)]
    return cache


def test_tokens_are_read_from_the_cache_that_was_given(model, tokenizer, folder):
    plain, exact, half = (
        run_tasks(model, tokenizer, ["rolling"], folder, cache=cache)
        for cache in (None, DynamicCache, halved)
    )
    outcomes = [torch.tensor(report.tasks[0].scores[0].outcomes) for report in (plain, exact, half)]
    assert torch.allclose(outcomes[0], outcomes[1], rtol=1e-5)
    assert not torch.allclose(outcomes[0], outcomes[2], rtol=1e-3)
    assert [report.cache for report in (plain, exact, half)] == [None, "DynamicCache", "DynamicCache"]


def test_answers_are_written_alike_by_model_and_decoder(model, tokenizer, folder):
    one, two = (run_tasks(model, tokenizer, ["written"], folder, decoder=d) for d in (None, Decoder(model)))
    (found,) = one.tasks[0].scores
    assert found.kind == "number"
    assert 0 < max(found.outcomes) <= 9
    assert two.tasks == one.tasks
    (compared,) = two.against(one).comparisons
    assert (compared.difference, compared.gained) == (0, None)


def test_nothing_of_the_caller_is_changed(model, tokenizer, folder):
    before = random.getstate(), torch.get_rng_state(), len(tokenizer), tokenizer.pad_token
    model.train()
    try:
        run_tasks(model, tokenizer, ["first"], folder, limit=2, fewshot=1)
        assert model.training
    finally:
        model.eval()
    assert (random.getstate(), len(tokenizer), tokenizer.pad_token) == (before[0], *before[2:])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_yaml_file_is_a_task_and_limits_are_reported(model, tokenizer, folder):
    report = run_tasks(model, tokenizer, [str(folder / "first.yaml")], limit=3, fewshot=2)
    (task,) = report.tasks
    assert (len(task.items), task.documents, task.fewshot, report.limit) == (3, 8, 2, 3)
    full = run_tasks(model, tokenizer, ["first"], folder)
    with pytest.raises(EvalError, match="asked differently: limit 3 and None, fewshot 2 and None"):
        report.against(full)


def test_other_items_are_not_compared(model, tokenizer, folder):
    report = run_tasks(model, tokenizer, ["first"], folder)
    data = report.to_json()
    data["tasks"][0]["items"][0] = "0" * 16
    with pytest.raises(EvalError, match="not answer the same items of first: of 8 and 8, 7 have the same"):
        report.against(TaskReport.from_json(data))
    with pytest.raises(EvalError, match="was not asked first, but second"):
        report.against(run_tasks(model, tokenizer, ["second"], folder))


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        (["frist"], "unknown task 'frist': did you mean first"),
        (["nowhere.yaml"], "no task file nowhere.yaml"),
        ([], "no task was named"),
    ],
)
def test_what_is_not_known_is_told_without_reading_data(folder, tasks, told, monkeypatch):
    from quantkit_eval import tasks as room

    monkeypatch.setattr(room, "_whole_index", room._index)  # 14,000 files less
    with pytest.raises(EvalError, match=told):
        check_tasks(tasks, folder)


def test_what_cannot_be_run_is_told(model, tokenizer, folder, tmp_path):
    yaml = (folder / "first.yaml").read_text()
    (tmp_path / "lost.yaml").write_text(yaml.replace("first.jsonl", "lost.jsonl"))
    with pytest.raises(EvalError, match=r"lost.yaml cannot be loaded: .*lost.jsonl"):
        run_tasks(model, tokenizer, [str(tmp_path / "lost.yaml")])
    (tmp_path / "code.yaml").write_text(yaml + "unsafe_code: true\n")
    with pytest.raises(EvalError, match="first runs code that the model writes"):
        run_tasks(model, tokenizer, [str(tmp_path / "code.yaml")])
    written = (folder / "written.yaml").read_text().replace("own.length", f"{folder}/own.length")
    (tmp_path / "beams.yaml").write_text(written.replace("do_sample: false", "num_beams: 2"))
    with pytest.raises(EvalError, match="generation with num_beams, which only transformers has"):
        run_tasks(model, tokenizer, [str(tmp_path / "beams.yaml")], decoder=Decoder(model))
    for options, told in (
        ({"limit": 0}, "limit must be at least 1"),
        ({"fewshot": -1}, "fewshot must be 0 or more"),
        ({"chat_template": True}, "has no chat template"),
    ):
        with pytest.raises(EvalError, match=told):
            run_tasks(model, tokenizer, ["first"], folder, **options)
