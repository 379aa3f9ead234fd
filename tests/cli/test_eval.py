"""`quantkit eval`: the table names its models once, and nothing else is printed into a log."""

import json
import sys
from importlib.util import find_spec

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


@pytest.mark.parametrize("run_in", ["auto", "transformers"])
def test_long_texts_of_a_cache_are_compared_by_position(capsys, tmp_path, run_in):
    target = tmp_path / "report.json"
    arguments = ["eval", MODEL, "--kv-cache", "int4", "--long", "3", "--device", "cpu", "--run-in", run_in]
    assert run([*arguments, "--json", str(target)]) == 0
    out = capsys.readouterr().out
    assert "KL(baseline || model)" in out
    assert "4 texts of 3 tokens" in " ".join(out.split())
    report = json.loads(target.read_text())
    assert (report["schema"], report["cache"]) == ("quantkit-long/1", "KV int4 token, rotated")
    for written in report["written"]:
        assert [bucket["last"] for bucket in written["curve"]] == [1, 2, 3]
        assert written["kl_mean"] > 1e-4


def test_long_texts_of_two_models_are_compared(tmp_path):
    target = tmp_path / "report.json"
    assert (
        run(["eval", MODEL, "--baseline", MODEL, "--long", "2", "--device", "cpu", "--json", str(target)])
        == 0
    )
    for written in json.loads(target.read_text())["written"]:
        assert written["first_difference"] == [None] * 4
        assert written["kl_max"] < 1e-5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--long", "3"], "add --baseline or --kv-cache"),
        (["--long", "3", "--stride", "8"], "--stride cannot be combined with --long"),
        (["--tasks", "a", "--long", "3"], "--long cannot be combined with --tasks"),
        (["--tasks", ","], "no task is named in ','"),
        (["--fewshot", "0"], "--fewshot cannot be combined with an evaluation on text"),
    ],
)
def test_kinds_of_evaluation_are_kept_apart(capsys, options, told):
    assert run(["eval", MODEL, "--device", "cpu", *options]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_tasks_without_the_harness_say_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(["eval", MODEL, "--tasks", "hellaswag", "--device", "cpu"]) == 2
    assert "`pip install 'quantkit[tasks]'`" in capsys.readouterr().err


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{a}} and {{b}} is"
doc_to_choice: ["one", "two", "a man", "the"]
doc_to_target: "{{a}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
@pytest.mark.filterwarnings("default")
def test_tasks_run_natively_and_a_report_is_a_baseline(capsys, tmp_path):
    data, first, second = (tmp_path / name for name in ("sums.jsonl", "first.json", "second.json"))
    data.write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a in range(4) for b in range(3)))
    (tmp_path / "sums.yaml").write_text(
        TASK.replace("DATA", str(data)).replace("CACHE", str(tmp_path / "cache"))
    )
    ask = ["eval", MODEL, "--tasks", "sums", "--include-path", str(tmp_path), "--device", "cpu"]
    assert run([*ask, "--run-in", "transformers", "--json", str(first)]) == 0
    capsys.readouterr()
    assert run([*ask, "--baseline", str(first), "--json", str(second)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "won / lost" in out
    assert "run natively" in out
    one, two = (json.loads(path.read_text()) for path in (first, second))
    assert (one["ran"], two["ran"], two["baseline"]["ran"]) == ("transformers", "native", "transformers")
    assert two["tasks"] == one["tasks"]
    (compared,) = two["comparisons"]
    assert (compared["items"], compared["gained"], compared["lost"], compared["p_mid"]) == (12, 0, 0, 1)
    first.write_text("{")
    assert run([*ask, "--baseline", str(first)]) == 2
    assert "is no JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--kv-cache", "FP8"], "needs calibrated scales"),
        (["--kv-cache", "int9"], "unknown KV cache 'int9'"),
    ],
)
def test_a_cache_that_cannot_be_had_is_an_error(capsys, options, told):
    assert run(["eval", MODEL, *SHORT, *options]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
