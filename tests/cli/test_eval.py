"""`quantkit eval`: the table names its models once, and nothing else is printed into a log."""

import json

import pytest

from quantkit import assets
from quantkit.cli.main import run

MODEL = str(assets.default_model())
SHORT = ["--context", "64", "--max-tokens", "256", "--device", "cpu"]


def test_rows_call_the_models_what_the_columns_do(capsys, tmp_path):
    target = tmp_path / "report.json"
    assert run(["eval", MODEL, "--baseline", MODEL, *SHORT, "--json", str(target)]) == 0
    out = capsys.readouterr().out
    head = next(line for line in out.splitlines() if "baseline" in line)
    assert "model" in head
    assert "KL(baseline || model), mean" in out
    assert "original" not in out
    assert "quantized" not in out
    assert json.loads(target.read_text())["tokens"] == 252


def test_one_model_has_one_column(capsys):
    assert run(["eval", MODEL, *SHORT]) == 0
    out = capsys.readouterr().out
    assert "baseline" not in out
    assert "perplexity" in out


def test_progress_bars_of_transformers_stay_out_of_logs(capsys):
    assert run(["eval", MODEL, *SHORT]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1  # the model, its dtype and its device
    assert "%|" not in err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--text", "nowhere.txt"], "no evaluation text nowhere.txt"),
        (["--max-tokens", "8"], "less than one window"),
        (["--context", "99999"], "beyond the model's"),
    ],
)
def test_bad_input_is_an_error_of_one_line(capsys, options, told):
    assert run(["eval", MODEL, "--context", "64", "--device", "cpu", *options]) == 2
    assert told in capsys.readouterr().err


def test_another_cache_is_measured_as_it_decodes(capsys, tmp_path):
    target = tmp_path / "report.json"
    arguments = ["eval", MODEL, "--baseline", MODEL, "--kv-cache", "INT4", *SHORT]
    assert run([*arguments, "--json", str(target)]) == 0
    out = capsys.readouterr().out
    assert "KV int4 token, rotated, as decoding sees it" in " ".join(out.split())
    report = json.loads(target.read_text())
    assert (report["cache"], report["cache_step"]) == ("KV int4 token, rotated", None)
    assert report["kl_mean"] > 1e-4


def test_long_texts_are_compared_by_position(capsys, tmp_path):
    target = tmp_path / "report.json"
    arguments = [
        "eval",
        MODEL,
        "--kv-cache",
        "int8",
        "--long-generation",
        "--new-tokens",
        "3",
        "--device",
        "cpu",
    ]
    assert run([*arguments, "--json", str(target)]) == 0
    out = capsys.readouterr().out
    assert "KL(exact || cache)" in out
    assert "4 texts of 3 tokens" in " ".join(out.split())
    report = json.loads(target.read_text())
    assert report["schema"] == "quantkit-long-generation/1"
    assert [bucket["last"] for bucket in report["curve"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--kv-cache", "FP8"], "needs calibrated scales"),
        (["--kv-cache", "int9"], "unknown KV cache 'int9'"),
        (["--long-generation"], "compares a quantized KV cache with an exact one; add --kv-cache"),
    ],
)
def test_a_cache_that_cannot_be_had_is_an_error(capsys, options, told):
    assert run(["eval", MODEL, *SHORT, *options]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
