"""The flags of `quantize` for the closing evaluation reach the library, or are refused before anything is computed."""

import pytest

import quantkit.pipeline.quantize as pipeline
from quantkit.cli.main import run
from quantkit.errors import OutputError


@pytest.fixture
def asked(monkeypatch):
    """The keyword arguments that `quantize` is called with."""
    calls = []

    def refuse(recipe, **given):
        calls.append(given)
        raise OutputError("far enough")

    monkeypatch.setattr(pipeline, "quantize", refuse)
    return calls


@pytest.mark.parametrize(
    ("flags", "tokens", "texts"),
    [
        ([], None, None),
        (["--eval-tokens", "500"], 500, None),
        (["--eval-text", "a.txt", "--eval-text", "b.txt"], None, ("a.txt", "b.txt")),
    ],
)
def test_evaluation_flags_reach_the_library(asked, flags, tokens, texts):
    assert run(["quantize", "w4a16-rtn", *flags]) == 2
    assert (asked[0]["evaluate"], asked[0]["eval_tokens"], asked[0]["eval_text"]) == (True, tokens, texts)


@pytest.mark.parametrize(
    "flags",
    [["--eval-tokens", "1"], ["--no-eval", "--eval-tokens", "9"], ["--no-eval", "--eval-text", "a.txt"]],
)
def test_flags_that_measure_nothing_are_refused(asked, flags, capsys):
    assert run(["quantize", "w4a16-rtn", *flags]) == 2
    assert not asked
    assert "--eval-tokens" in capsys.readouterr().err
