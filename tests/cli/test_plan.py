"""`quantkit plan`: sizes, cache and roofline of a recipe on a model, from headers alone."""

import json
import math
import subprocess
import sys

import made_up_rates
import published
import pytest

from quantkit import assets
from quantkit.cli.main import run
from quantkit.cost.hardware import Hardware, keep, known
from quantkit.cost.rates import keep_rates, rates_file

BOOKWORM = str(assets.default_model())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test sees what was measured of this machine, or measures it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep_rates(made_up_rates.rates())


def report(capsys, *arguments):
    assert run(["plan", *arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def planned(tmp_path, capsys, config, *arguments):
    """(the report, the bits per weight by kind) of W4A16 RTN on a published model."""
    weights = published.write(tmp_path / "m", config)
    found = report(capsys, "w4a16-rtn", "--model", str(tmp_path / "m"), *arguments)
    assert sum(part["weights"] for part in found["parts"]) == weights
    assert sum(part["bytes"] for part in found["parts"]) == found["prediction"]["tensors"]
    return found, {part["kind"]: part["bits_per_weight"] for part in found["parts"]}


def test_the_text_names_sizes_cache_and_both_steps(capsys):
    asked = ["w4a16-rtn", "--model", BOOKWORM, "--hardware", "L4", "--context", "512", "--batch", "2"]
    assert run(["plan", *asked]) == 0
    shown = capsys.readouterr().out
    for word in ("attention", "MLP", "embedding", "carried", "free disk needed", "memory on the CPU"):
        assert word in shown
    assert "KV cache, 16 bits: 4.19 MB for 2 sequences of 512 tokens" in shown
    assert shown.count("self_attn.q_proj") == 3  # the kernels, and both steps
    assert "prefill on NVIDIA L4" in shown
    assert "decode, 2 sequences of 512 tokens: at most" in shown
    assert "fit in its memory of 24.00 GB" in shown


def test_a_report_of_llama_3_8b_adds_up(tmp_path, capsys):
    found, bits = planned(
        tmp_path, capsys, published.LLAMA_3_8B, "--hardware", "h100", "--context", "1000", "--batch", "3"
    )
    assert found["schema"] == "quantkit-plan/1"
    assert list(bits) == ["attention", "MLP", "head", "embedding", "carried"]
    assert bits["attention"] == pytest.approx(4 + 16 / 128, abs=1e-3)
    assert bits["head"] == bits["embedding"] == bits["carried"] == 16
    assert found["kv_cache"] == {"scheme": None, "bytes": 3 * 1000 * 128 * 1024}
    (device,) = found["roofline"]
    assert device["hardware"]["bandwidth"] == known()["h100"].bandwidth
    for step, tokens in (("prefill", 3000), ("decode", 3)):
        least = sum(one["seconds"] for one in device[step]["operators"])
        assert device[step]["seconds"] == pytest.approx(least)
        assert device[step]["tokens_per_s"] == pytest.approx(tokens / least)
    bound = {one["name"].rpartition(".")[2]: one["bound"] for one in device["prefill"]["operators"]}
    assert (bound["up_proj"], bound["add"]) == ("compute", "memory")
    assert {one["bound"] for one in device["decode"]["operators"] if one["bytes"]} == {"memory"}


def test_llama_3_70b(tmp_path, capsys):
    found, bits = planned(
        tmp_path, capsys, published.LLAMA_3_70B, "--hardware", "a6000", "--hardware", "h200"
    )
    assert found["prediction"]["tensors"] == pytest.approx(39.7e9, rel=0.02)
    assert bits["MLP"] == pytest.approx(bits["attention"], abs=1e-4)
    small, large = (device["decode"]["tokens_per_s"] for device in found["roofline"])
    assert small == pytest.approx(768e9 / 38.9e9, rel=0.05)  # all but the embeddings, and the cache
    assert large / small == pytest.approx(4800 / 768, rel=0.01)


@pytest.mark.slow
def test_qwen3_235b_reads_the_chosen_experts_only(tmp_path, capsys):
    found, bits = planned(tmp_path, capsys, published.QWEN3_235B, "--hardware", "h200")
    assert list(bits) == ["attention", "MLP", "experts", "head", "embedding", "carried"]
    assert bits["MLP"] == 16  # routers
    (experts,) = (part for part in found["parts"] if part["kind"] == "experts")
    assert experts["weights"] == 94 * 128 * 3 * 1536 * 4096
    decode = found["roofline"][0]["decode"]["operators"]
    read = sum(one["count"] * one["bytes"] for one in decode if ".experts." in one["name"])
    assert read == pytest.approx(experts["bytes"] * 8 / 128, rel=0.01)


def test_time_kernels_engines_and_budget_are_told(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "weights: {preset: W4A16, algorithm: gptq}\ncalibration: {samples: 128, sequence_length: 512}\n"
        "rules: [{match: '*.v_proj', bits: 5, group_size: 32}]\n"
        "output: {allow_split_fusion: true}\nbudget: {ram: 800MB, disk: 1GB}\ntarget: quantkit\n"
    )
    found = report(capsys, str(recipe), "--model", BOOKWORM)
    time = found["time"]
    assert time["total"] == pytest.approx(sum(time["phases"].values()) - time["phases"]["evaluate"])
    assert (time["threads"], time["phases"]["start"]) == (2, 3.0)
    assert found["budget"]["limits"] == {"ram": 800_000_000, "disk": 1_000_000_000}
    assert found["budget"]["ways"]["spilled"] is True
    assert found["prediction"]["memory"] <= 800_000_000
    kernels = {one["name"]: [each["backend"] for each in one["kernels"]] for one in found["kernels"]}
    assert kernels["self_attn.v_proj"] == ["reference", "triton"]
    assert "quantkit" in found["target"]
    assert found["engines"] == []
    assert run(["plan", str(recipe), "--model", BOOKWORM]) == 0
    shown = capsys.readouterr().out
    for word in ("time on this machine (2 threads): about", "hidden states lie on disk", "start 3.0 s"):
        assert word in shown
    assert "to evaluate" in shown
    without = report(capsys, "w4a16-rtn", "--model", BOOKWORM, "--no-time")
    assert "time" not in without
    assert any(each["runs"] and "vLLM" in each["said"] for each in without["engines"])


def test_a_budget_that_cannot_be_ends_with_code_2(capsys):
    asked = ["plan", "w4a16-gptq", "--model", BOOKWORM, "--set", "budget.ram=500MB"]
    assert run(asked) == 2
    assert "budget.ram: 476.84 MiB is too little" in capsys.readouterr().err


def test_a_machine_that_cannot_be_measured_is_an_error(capsys, monkeypatch):
    rates_file().unlink()
    monkeypatch.setattr("quantkit.cli.plan.MEASURE", "quantkit.no_such_module")
    assert run(["plan", "w4a16-rtn", "--model", BOOKWORM]) == 1
    assert "could not be measured" in (said := capsys.readouterr().err)
    assert "--no-time" in said


def test_a_quantized_cache_is_named_and_smaller(capsys):
    exact, int8 = (report(capsys, name, "--model", BOOKWORM)["kv_cache"] for name in ("w4a16-rtn", "kv-int8"))
    assert "int8" in int8["scheme"].lower()
    assert int8["bytes"] == exact["bytes"] * (8 + 32 / 64) / 16


def test_without_hardware_this_machine_is_taken_once_it_was_measured(capsys):
    before = report(capsys, "w4a16-rtn", "--model", BOOKWORM)
    assert before["roofline"] == []
    assert "has not been measured" in before["notes"][0]
    keep(Hardware("auto", "a CPU", None, 50e9, {"fp32": 1e11}, "made up"))
    (device,) = report(capsys, "w4a16-rtn", "--model", BOOKWORM)["roofline"]
    assert device["hardware"]["title"] == "a CPU"
    assert math.isfinite(device["decode"]["tokens_per_s"])


def test_the_model_may_stand_in_the_recipe(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {BOOKWORM}\nweights: {{preset: W4A16, algorithm: rtn}}\n")
    assert report(capsys, str(recipe))["parts"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["w4a16-rtn", "--model", BOOKWORM, "--hardware", "h300"],
            "no hardware 'h300'; known are auto, a100",
        ),
        (["w4a16-rtn", "--model", BOOKWORM, "--hardware", "auto"], "has not been measured"),
        (["w4a16-rtn", "--model", BOOKWORM, "--context", "0"], "--context"),
        (["no-such-recipe", "--model", BOOKWORM], "no-such-recipe"),
        (["w4a16-rtn", "--model", "/nonexistent/model"], "/nonexistent/model"),
    ],
)
def test_wrong_input_ends_with_code_2(capsys, arguments, said):
    assert run(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_without_a_model_the_embedded_one_is_planned(capsys):
    assert run(["plan", "w4a16-rtn", "--hardware", "h100"]) == 0
    unnamed = capsys.readouterr().out
    assert run(["plan", "w4a16-rtn", "--hardware", "h100", "--model", BOOKWORM]) == 0
    assert capsys.readouterr().out == unnamed


@pytest.mark.parametrize("to_file", [False, True])
def test_json_needs_no_torch(tmp_path, to_file):
    code = (
        "import sys; from quantkit.cli.main import run; code = run(sys.argv[1:]); "
        "sys.exit(code or 10 * bool({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    file = tmp_path / "report.json"
    asked = ["plan", "w4a16-rtn", "--model", BOOKWORM, "--hardware", "a100"]
    asked += ["--json", str(file) if to_file else "-"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text() if to_file else done.stdout)["roofline"]
