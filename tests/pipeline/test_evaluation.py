"""The closing evaluation: what it is asked for, checked before a run begins, and what it measures."""

import hashlib
import json
import tempfile
from dataclasses import replace

import pytest
import quantkit_eval
from quantkit_eval.errors import BrokenModel

import quantkit
from quantkit.checkpoint.load import load
from quantkit.checkpoint.manifest import read_manifest
from quantkit.cli.main import run
from quantkit.errors import DataError, ModelError, UserError
from quantkit.pipeline import cache
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
    first = quantkit.quantize(**given, eval_text=text, eval_tokens=300).report.evaluation
    assert first.text == ["own.txt"]
    assert (first.max_tokens, first.stopped_early) == (300, False)
    assert first.windows == 300 // first.context
    again = quantkit.quantize(**given, eval_text=text, eval_tokens=300).report.evaluation
    assert again == first
    more = quantkit.quantize(**given, eval_text=text, eval_tokens=600).report.evaluation
    assert more.windows == 600 // first.context
    assert quantkit.quantize(**given).report.evaluation == more  # whatever was measured answers the default


def test_a_stored_report_answers_only_what_it_measured(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text")
    digest = hashlib.sha256(b"some text").hexdigest()
    fit = quantkit_eval.Fit(2.0, None, 0.7, None)
    stored = quantkit_eval.Report(
        100, 1, 100, 100, ["a.txt"], digest, fit, max_tokens=TOKENS, stopped_early=True
    )
    own = (str(text),)
    assert EvaluationRequest().answered_by(stored)
    assert EvaluationRequest(text=own).answered_by(stored)
    assert not EvaluationRequest(100, own).answered_by(stored)
    assert not EvaluationRequest(TOKENS, own).answered_by(stored)
    assert EvaluationRequest(TOKENS, own).answered_by(replace(stored, stopped_early=False))
    assert not EvaluationRequest().answered_by(None)
    text.write_text("other text under the same name")
    assert not EvaluationRequest(text=own).answered_by(stored)


@pytest.fixture
def caching(tmp_path, monkeypatch):
    """A cache of its own, as large as it likes."""
    monkeypatch.delenv("QUANTKIT_CACHE_GB")
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_sweep_evaluates_the_original_once(arguments, tmp_path, caching, monkeypatch):
    runs = []

    def counting(path, **options):
        model = load(path, **options)
        block = model.model.layers[0]
        block.register_forward_hook(lambda *_: runs.append("packed" if "out" in str(path) else "original"))
        return model

    monkeypatch.setattr("quantkit.checkpoint.load.load", counting)
    reports = {}
    for name, changes in (("a", {}), ("b", {"overrides": ["weights.bits=8"]}), ("c", {"overrides": []})):
        given = arguments("rtn", tmp_path / f"out-{name}") | {"evaluate": True, "eval_tokens": 640} | changes
        reports[name] = quantkit.quantize(**given).report.evaluation
        assert runs.count("original") * len(reports) == runs.count("packed")
    assert reports["a"] == reports["c"]
    assert reports["a"].original == reports["b"].original
    assert any(caching.iterdir())
    monkeypatch.setenv("QUANTKIT_CACHE_GB", "0")
    again = arguments("rtn", tmp_path / "out-d") | {"evaluate": True, "eval_tokens": 640}
    assert quantkit.quantize(**again).report.evaluation == reports["a"]
    assert runs.count("original") * 2 == runs.count("packed")


def test_the_cache_lies_where_the_user_wants_it(monkeypatch, tmp_path):
    for name in ("QUANTKIT_CACHE", "QUANTKIT_CACHE_GB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "quantkit" / "evaluation"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.cache_folder() == tmp_path / ".cache" / "quantkit" / "evaluation"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "quantkit" / "evaluation"
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"
    assert cache.cache_limit() == 4_000_000_000
    monkeypatch.setenv("QUANTKIT_CACHE_GB", "0.5")
    assert cache.cache_limit() == 500_000_000
    monkeypatch.setenv("QUANTKIT_CACHE_GB", "0")
    assert cache.evaluation_cache("digest") is None


@pytest.mark.parametrize("wrong", ["much", "-1", "nan", "inf", "1 GB"])
def test_a_limit_that_is_no_number_stops_before_the_run(arguments, tmp_path, monkeypatch, wrong):
    monkeypatch.setenv("QUANTKIT_CACHE_GB", wrong)
    with pytest.raises(UserError, match="QUANTKIT_CACHE_GB must be a number of gigabytes"):
        quantkit.quantize(**(arguments("rtn", tmp_path / "out") | {"evaluate": True}))
    assert not (tmp_path / "out").exists()


def test_a_failed_evaluation_leaves_the_weights_finished(arguments, tmp_path, monkeypatch):
    """It is a note and `failed`; the next call only evaluates, and its result is that of a run without a failure."""
    wanted = quantkit.quantize(**arguments("rtn", tmp_path / "whole", evaluate=True))
    given = arguments("rtn", tmp_path / "out", evaluate=True)

    def fail(*rest, **options):
        raise DataError("a text that is\nno text")

    with monkeypatch.context() as patch:
        patch.setattr("quantkit.pipeline.quantize.evaluate_pair", fail)
        result = quantkit.quantize(**given)
        assert "the evaluation failed: a text that is no text; the weights in" in result.failed
        assert result.report.notes[-1] == result.failed
        assert result.manifest.evaluation is None
    quantkit.load(tmp_path / "out", device="cpu")
    monkeypatch.setattr("quantkit.pipeline.quantize.produce", lambda *rest: pytest.fail("computed again"))
    again = quantkit.quantize(**given)
    assert again.failed is None
    assert again.manifest == wanted.manifest
    assert again.report.notes == wanted.report.notes


@pytest.mark.parametrize(
    ("error", "wanted", "kept"),
    [
        (MemoryError(), "the evaluation failed: out of memory: MemoryError; close other programs", False),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory"),
            "the evaluation failed: out of memory: D",
            False,
        ),
        (BrokenModel("no finite loss"), "the evaluation failed: no finite loss; the weights", False),
        (OSError(28, "No space left on device"), "No space left on device; the weights", False),
        (KeyError("a bug"), "the evaluation failed: unexpected KeyError: 'a bug' (traceback in ", True),
    ],
)
def test_why_an_evaluation_failed(arguments, tmp_path, monkeypatch, error, wanted, kept):
    """No memory says memory, and what nobody foresaw leaves its traceback in a file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(*rest, **options):
        raise error

    monkeypatch.setattr("quantkit.pipeline.quantize.evaluate_pair", fail)
    result = quantkit.quantize(**arguments("rtn", tmp_path / "out", evaluate=True))
    assert wanted in result.failed
    assert result.manifest.files
    files = list(tmp_path.glob("quantkit-*.txt"))
    assert len(files) == kept
    for file in files:
        assert str(file) in result.failed
        assert "raise error" in file.read_text()


def test_a_result_that_is_no_number_is_a_failed_evaluation(arguments, tmp_path, monkeypatch):
    fit = quantkit_eval.Fit(float("nan"), None, float("nan"), None)
    monkeypatch.setattr(
        "quantkit.pipeline.quantize.evaluate_pair",
        lambda *rest, **options: (quantkit_eval.Report(1, 1, 1, 1, [], "", fit), []),
    )
    result = quantkit.quantize(**arguments("rtn", tmp_path / "out", evaluate=True))
    assert "the evaluation failed" in result.failed
    assert read_manifest(tmp_path / "out").evaluation is None


def test_a_failed_evaluation_is_exit_code_1(arguments, tmp_path, monkeypatch, capsys):
    def fail(*rest, **options):
        raise ModelError("the original cannot be read")

    monkeypatch.setattr("quantkit.pipeline.quantize.evaluate_pair", fail)
    given = arguments("rtn", tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(json.dumps(given["recipe"]))
    command = ["quantize", str(tmp_path / "recipe.yaml"), "--model", given["model"]]
    assert run([*command, "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "the evaluation failed: the original cannot be read" in " ".join((said.out + said.err).split())
    assert (tmp_path / "out/quantkit.json").exists()
