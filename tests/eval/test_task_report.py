"""Reports of tasks compared item by item, without the harness."""

import json
import math
from dataclasses import replace

import pytest
from quantkit_eval import EvalError, TaskReport
from quantkit_eval.mcnemar import mcnemar
from quantkit_eval.task_report import GroupScore, Score, TaskScores, kind_of


def scores(metric, outcomes, kind="binary", name="a"):
    """A task with one metric of these outcomes."""
    items = [f"{name}{i}" for i in range(5)]
    value = None if kind == "corpus" else 0.5
    return TaskScores(name, "1", "x", 0, 5, items, [Score(metric, "none", kind, True, value, None, outcomes)])


def report(*tasks, groups=()):
    return TaskReport("m", "lm-eval 0", "native", None, None, None, False, 0, list(tasks), list(groups))


def test_only_items_that_one_gets_right_count():
    ours, theirs = report(scores("acc", [1, 0, 1, 1, 0])), report(scores("acc", [0, 0, 0, 1, 1]))
    (found,) = ours.against(theirs).comparisons
    assert (found.items, found.gained, found.lost) == (5, 2, 1)
    assert found.difference == pytest.approx(1 / 5)
    assert found.difference_se == pytest.approx(
        (sum((d - 0.2) ** 2 for d in (1, 0, 1, 0, -1)) / 4 / 5) ** 0.5
    )
    assert (found.p_exact, found.p_mid) == (mcnemar(2, 1).p_exact, mcnemar(2, 1).p_mid)


def test_a_group_is_compared_over_the_items_of_its_tasks():
    group = GroupScore("both", ["a", "b"], "acc", "none", 0.5, None)
    ours = report(scores("acc", [1] * 5), scores("acc", [0] * 5, name="b"), groups=[group])
    theirs = report(scores("acc", [0] * 5), scores("acc", [1, 0, 0, 0, 0], name="b"), groups=[group])
    whole = ours.against(theirs).comparisons[-1]
    assert (whole.task, whole.items, whole.gained, whole.lost) == ("both", 10, 5, 1)


def test_rates_are_compared_per_unit():
    ours, theirs = (
        [[-4.0, 2.0], [-9.0, 3.0], None, [-1.0, 1.0], [-2.0, 4.0]],
        [[-2.0, 2.0]] + [[-1.0, n] for n in (3.0, 9.0, 1.0, 4.0)],
    )
    (found,) = report(scores("ppl", ours, "rate")).against(report(scores("ppl", theirs, "rate"))).comparisons
    assert (found.items, found.p_mid) == (4, None)
    assert found.difference == pytest.approx((2 + 8 + 0 + 1) / 10)


@pytest.mark.parametrize("kinds", [("corpus", "corpus"), ("binary", "corpus"), ("rate", "binary")])
def test_what_has_no_value_for_an_item_is_said(kinds):
    outcomes = {"corpus": None, "binary": [1] * 5, "rate": [[-1.0, 2.0]] * 5}
    ours, theirs = (report(scores("bleu", outcomes[kind], kind)) for kind in kinds)
    (found,) = ours.against(theirs).comparisons
    assert (found.difference, found.p_mid) == (None, None)
    assert "no value for a single item" in found.note


def test_numbers_have_a_difference_and_no_test_of_wins():
    ours, theirs = (report(scores("f1", [x] * 5, "number")) for x in (0.75, 0.5))
    (found,) = ours.against(theirs).comparisons
    assert (found.difference, found.gained, found.note) == (0.25, None, None)


def test_what_was_asked_otherwise_is_refused():
    ours = report(scores("acc", [1] * 5))
    with pytest.raises(EvalError, match="asked differently: seed 0 and 3"):
        ours.against(replace(ours, seed=3))
    with pytest.raises(EvalError, match="was not asked a, but b"):
        ours.against(report(scores("acc", [1] * 5, name="b")))
    moved = replace(ours.tasks[0], items=["x", *ours.tasks[0].items[1:]])
    with pytest.raises(EvalError, match="of 5 and 5, 4 have the same"):
        ours.against(report(moved))


def test_a_report_is_read_back_as_it_was():
    ours = report(scores("acc", [1, 0, 1, 1, 0]))
    both = ours.against(ours)
    assert TaskReport.from_json(json.loads(json.dumps(both.to_json(), allow_nan=False))) == both


def test_kinds_are_told_by_the_outcomes():
    assert kind_of([1, 0, True, 0.0], 0.5) == ("binary", [1, 0, 1, 0])
    assert kind_of([1, 0], 0.7)[0] == "number"  # aggregated otherwise than by the mean
    assert kind_of([0.5, None], 0.5) == ("number", [0.5, None])
    rate = ("rate", [[-3, 2], [-1.5, 4]])
    assert kind_of([(-3, 2), [-1.5, 4]], math.exp(0.75)) == rate  # a perplexity
    assert kind_of([(-3, 2), [-1.5, 4]], 0.75 / math.log(2)) == rate  # bits
    assert kind_of([None, (-3, 4)], math.exp(0.75)) == ("rate", [None, [-3, 4]])
    assert kind_of([("a", "b")], 1.0) == ("corpus", None)


def test_pairs_that_are_no_likelihoods_belong_to_the_corpus():
    assert kind_of([(0, 1), (1, 1)], 0.67) == ("corpus", None)  # (gold, predicted) of an F1
    assert kind_of([(0, 1), (0, 1)], 0.0) == ("corpus", None)
    assert kind_of([(0, 0)], 1.0) == ("corpus", None)
    assert kind_of([(-3, 2)], None) == ("corpus", None)
    assert kind_of([None], 1.0) == ("corpus", None)


@pytest.mark.parametrize(
    "data", [{"schema": "quantkit-eval/1"}, [], {"schema": "quantkit-tasks/1", "tasks": [{}]}]
)
def test_what_is_no_report_is_refused(data):
    with pytest.raises(EvalError, match="report of tasks"):
        TaskReport.from_json(data)
