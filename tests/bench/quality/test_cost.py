import subprocess
import sys

import pytest
import tiny_models
import torch

from quantkit.bench.quality import cost, oneshot
from quantkit.recipe.recipe import load_recipe

SMALL = ("weights.group_size=64", "calibration.samples=2", "calibration.sequence_length=16")
RIVAL = f"""#!{sys.executable}
import json, sys
isolated, script, model, windows, method = sys.argv[1:]
ids = json.load(open(windows))
assert isolated == "-I" and script.endswith("oneshot.py") and [len(w) for w in ids] == [16, 16]
print("chatter")
print(json.dumps({{"cpu_seconds": len(method), "versions": {{"theirs": "1"}}}}))
"""


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_a_round_runs_everything_on_the_same_windows(tmp_path, capsys):
    model = tiny_models.save(tiny_models.build("llama"), tmp_path / "tiny", torch.bfloat16)
    rival = program(tmp_path / "python", RIVAL)
    report = cost.measure(tmp_path / "work", ["gptq"], 1, rival, model, SMALL)
    mine, other = report["engines"]["gptq"], report["engines"]["llm-compressor gptq"]
    phases = {name: row["median"] for name, row in mine["phases"].items()}
    assert mine["quantizing"]["median"] == pytest.approx(sum(phases.get(p, 0.0) for p in cost.QUANTIZING))
    assert 0 < sum(phases.values()) < mine["process"]["median"]
    assert other["quantizing"]["rounds"] == [4]
    assert report["ours_over_rival"]["gptq"]["quantizing"] == mine["quantizing"]["median"] / 4
    assert report["rival_versions"] == {"theirs": "1"}
    assert (report["windows"], report["window_tokens"], report["machine"]["threads"]) == (2, 16, 1)
    assert f"{mine['quantizing']['median'] / 4:.2f} of llm-compressor gptq" in cost.table(report)
    assert not (tmp_path / "work" / "out").exists()


def test_rounds_interleave_and_ratios_are_taken_within_them(capsys):
    order = []

    def engine(name, *seconds):
        left = list(seconds)

        def run():
            order.append(name)
            return {"quantizing": left.pop(0), "process": 9.0, "phases": {"quantize": 1.0}}

        return run

    engines = {"awq-gptq": engine("a", 10, 30, 20), "llm-compressor awq": engine("b", 5, 10, 20)}
    report = cost.summary(cost.interleave(engines, 3))
    assert "".join(order) == "ababab"
    assert report["engines"]["awq-gptq"]["quantizing"] == {
        "median": 20,
        "min": 10,
        "max": 30,
        "mad": 10,
        "rounds": [10, 30, 20],
    }
    assert report["ours_over_rival"] == {
        "awq-gptq": {"rival": "llm-compressor awq", "quantizing": 2, "process": 1}  # of 2, 3 and 1
    }


def test_time_of_children_is_counted_and_their_failure_told(tmp_path):
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint('done')"
    said, seconds = cost.cpu_seconds([sys.executable, "-c", busy], tmp_path)
    assert said == "done\n"
    assert seconds > 0.29
    with pytest.raises(RuntimeError, match="no such luck"):
        cost.cpu_seconds([sys.executable, "-c", "raise SystemExit('no such luck')"], tmp_path)


def test_runs_differ_only_in_what_their_name_says():
    recipes = {name: load_recipe(run.recipe, run.overrides).resolved() for name, run in cost.RUNS.items()}
    plain, retarget = recipes["gptq"], recipes["gptq-retarget"]
    assert plain["weights"]["algorithm"].pop("retarget") == 0
    assert retarget["weights"]["algorithm"].pop("retarget") == 1
    assert plain == retarget
    for recipe in recipes.values():
        assert (recipe["calibration"]["samples"], recipe["calibration"]["sequence_length"]) == (128, 512)
        assert (recipe["weights"]["bits"], recipe["weights"]["group_size"]) == (4, 128)


def test_the_rivals_script_imports_only_when_it_runs():
    """-I keeps the benchmarks' folder, whose modules are named like packages, off its path."""
    code = f"import runpy; runpy.run_path({oneshot.__file__!r}); import sys; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert not {"quantkit", "torch", "transformers", "llmcompressor"} & set(done.stdout.split())
