"""The closing evaluation: what it is asked for, checked before a run begins, and what it measures."""

import pytest

import quantkit
from quantkit.errors import DataError
from quantkit.pipeline.evaluation import TOKENS, EvaluationRequest


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"eval_tokens": 3}, "at least one window of"),
        ({"eval_tokens": 0}, "got 0"),
        ({"eval_tokens": True}, "got True"),
        ({"eval_tokens": 1e9}, "got 1000000000.0"),
        ({"eval_text": "nowhere.txt"}, "no evaluation text nowhere.txt"),
        ({"eval_text": ["hf:"]}, "not of the form hf:name"),
        ({"eval_text": "a\0b"}, "no evaluation text"),
        ({"eval_text": "~nosuchuser/x"}, "no evaluation text"),
    ],
)
def test_a_request_that_cannot_be_met_stops_before_anything_is_written(arguments, tmp_path, options, told):
    with pytest.raises(DataError, match=told):
        quantkit.quantize(**(arguments("rtn", tmp_path / "out") | {"evaluate": True} | options))
    assert not (tmp_path / "out").exists()


def test_a_run_is_evaluated_on_the_text_and_the_tokens_asked_for(arguments, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    given = arguments("rtn", tmp_path / "out") | {"evaluate": True}
    first = quantkit.quantize(**given, eval_text=text, eval_tokens=300).report["evaluation"]
    assert first["text"] == ["own.txt"]
    assert (first["max_tokens"], first["stopped_early"]) == (300, False)
    assert first["windows"] == 300 // first["context"]
    again = quantkit.quantize(**given, eval_text=text, eval_tokens=300).report["evaluation"]
    assert again == first
    more = quantkit.quantize(**given, eval_text=text, eval_tokens=600).report["evaluation"]
    assert more["windows"] == 600 // first["context"]
    assert (
        quantkit.quantize(**given).report["evaluation"] == more
    )  # whatever was measured answers the default


def test_a_stored_report_answers_only_what_it_measured():
    stored = {"text": ["a.txt"], "max_tokens": TOKENS, "stopped_early": True}
    assert EvaluationRequest().answered_by(stored)
    assert EvaluationRequest(text=("x/a.txt",)).answered_by(stored)
    assert not EvaluationRequest(text=("b.txt",)).answered_by(stored)
    assert not EvaluationRequest(TOKENS, ("a.txt",)).answered_by(stored)
    assert EvaluationRequest(TOKENS, ("a.txt",)).answered_by(stored | {"stopped_early": False})
    assert not EvaluationRequest().answered_by(None)
