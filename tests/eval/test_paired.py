"""Paired comparisons: hand-made windows, Student's t of tables, and Holm's correction."""

import math
import random
from dataclasses import replace

import pytest
import torch
from quantkit_eval import EvalError, WindowScores, compare_all, evaluate
from quantkit_eval.paired import difference, holm


def scores(kl, tokens=10, nll=None):
    return WindowScores((tokens,) * len(kl), tuple(nll or kl), (), tuple(kl), tuple(kl))


def noisy(mean, spread, count, seed):
    chance = random.Random(seed)
    hard = [chance.gauss(5, 3) for _ in range(count)]  # shared by all models
    own = random.Random(f"{seed} {mean}")
    return scores([each + mean + own.gauss(0, spread) for each in hard])


def test_the_difference_is_taken_window_by_window():
    mean, se, p = difference(scores([10.0, 30.0, 50.0]), scores([9.0, 28.0, 49.0]), "kl")
    assert mean == pytest.approx(4 / 30)
    assert se == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3) / 10)  # of 1, 2 and 1, per token
    assert p == pytest.approx(0.05719, abs=2e-5)  # t = 4 with 2 degrees of freedom


@pytest.mark.parametrize(
    ("t", "windows", "p"), [(2.571, 6, 0.05), (3.169, 11, 0.01), (2.042, 31, 0.05), (4.297, 10, 0.002)]
)
def test_p_is_that_of_tables_of_students_t(t, windows, p):
    """Differences with the mean t and the standard error 1."""
    spread = math.sqrt(windows * (windows - 1) / (windows // 2 * 2))
    high = [t + spread] * (windows // 2) + [t - spread] * (windows // 2) + [t] * (windows % 2)
    assert difference(scores(high, 1), scores([0.0] * windows, 1), "kl")[2] == pytest.approx(p, rel=2e-3)


def test_holm_corrects_step_by_step():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_better_worse_and_undecided():
    models = {
        "good": noisy(0, 0.1, 40, 1),
        "bad": noisy(1, 0.1, 40, 1),
        "also good": noisy(0.001, 0.1, 40, 1),
    }
    answers = {(c.a, c.b): c.better for c in compare_all(models, "kl")}
    assert answers[("good", "bad")] == "yes"
    assert answers[("bad", "also good")] == "no"
    assert answers[("good", "also good")] == "undecided"


def test_of_many_equal_models_hardly_any_looks_better_than_another():
    """1225 pairs without a difference: uncorrected, about 61 would be below 0.05."""
    models = {f"{n}": noisy(n * 1e-9, 1.0, 20, 2) for n in range(50)}
    found = compare_all(models, "kl")
    assert sum(c.p < 0.05 for c in found) > 20
    assert all(c.better == "undecided" for c in found)


def test_the_same_model_and_a_single_window_are_undecided():
    same = scores([1.0, 2.0, 3.0])
    assert compare_all({"a": same, "b": same}, "nll")[0].p == 1
    (one,) = compare_all({"a": scores([1.0]), "b": scores([2.0])}, "nll")
    assert (one.se, one.better) == (None, "undecided")


def test_other_windows_are_refused():
    with pytest.raises(EvalError, match="no windows of the same tokens"):
        difference(scores([1.0, 2.0]), scores([1.0, 2.0], tokens=11), "kl")
    same, other = ((1.0, 2.0), (1.0, 2.01))  # the baseline's losses
    ours = scores([1.0, 2.0], nll=[3.0, 4.0])
    for original in (same, ()):
        difference(replace(ours, original_nll=same), replace(ours, original_nll=original), "nll")
    with pytest.raises(EvalError, match="no windows of the same tokens"):
        difference(replace(ours, original_nll=same), replace(ours, original_nll=other), "kl")
    with pytest.raises(EvalError, match="kl"):
        difference(WindowScores((1,), (1.0,)), scores([1.0]), "kl")


def test_an_evaluation_gives_its_windows(model, tokenizer, text):
    kept = []
    report = evaluate(
        model, tokenizer, text, baseline=model, context=32, max_tokens=400, per_window=kept.append
    )
    (found,) = kept
    assert sum(found.tokens) == report.tokens
    assert sum(found.nll) / report.tokens == pytest.approx(report.quantized.nll)
    assert found.nll == found.original_nll
    assert len(found.kl) == report.windows
    assert sum(found.agreed) == report.tokens
    assert WindowScores.from_json(found.to_json()) == found
    assert torch.tensor(found.kl).abs().max() < 1e-3
