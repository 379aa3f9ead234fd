"""Two processes share a run: the same result, a state to go on from, and the name of one that is lost."""

import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import quantkit_eval
import tiny_mixtures
import tiny_models
import torch

import quantkit
from quantkit import assets
from quantkit.checkpoint.journal import read_lines
from quantkit.checkpoint.manifest import read_manifest
from quantkit.errors import OutputError
from quantkit.models.tokenizer import open_tokenizer

pytestmark = pytest.mark.usefixtures("steady")
GPTQ = {"algorithm": {"name": "gptq", "retarget": 1.0}, "bits": 4, "group_size": 32, "symmetric": False}
RECIPES = {  # each ends in another statistic, or in another choice that all processes must make alike
    "gptq with head": {
        "weights": GPTQ,
        "rules": [{"match": "lm_head", "bits": 8}],
        "transforms": [{"name": "awq", "grid": 3, "windows": 2, "clip": True}],
    },
    "smoothquant_plus": {
        "weights": {"bits": 4, "group_size": 32, "algorithm": {"name": "rtn", "range": "weighted"}},
        "transforms": [{"name": "smoothquant_plus", "search_windows": 3}],
        "kv_cache": {"number": "fp8_e4m3"},
    },
    "static": {
        "weights": {"preset": "W8A8_STATIC", "algorithm": "gptq"},
        "transforms": [{"name": "smoothquant", "alpha": "auto", "search_windows": 2}],
    },
    "rtn": {"weights": {"bits": 4, "group_size": 32, "algorithm": "rtn"}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llama = tiny_models.FAMILIES["llama-gqa"](num_hidden_layers=2)
    tiny_models.save(llama, folder, dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def given(inputs, model):
    """given(recipe name, output) -> keyword arguments of `quantize`."""
    calibration = {"data": [str(inputs / "text")], "samples": 5, "sequence_length": 32}

    def make(name, output, **more):
        recipe = RECIPES[name] | {"calibration": dict(calibration)}
        return {
            "recipe": recipe,
            "model": str(model),
            "output": str(output),
            "evaluate": False,
        } | more

    return make


@pytest.fixture(scope="module")
def server():
    server = processes.Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def a_window_at_a_time(monkeypatch):
    monkeypatch.setattr("quantkit.calibration.walk.CHUNK_ELEMENTS", 1)


@pytest.fixture(scope="module")
def whole(server, given, tmp_path_factory):
    """whole(recipe name) -> its result of two processes."""
    folder, known = tmp_path_factory.mktemp("two"), {}

    def make(name):
        if name not in known:
            job = {"quantize": [given(name, folder / name)]}
            if name == "gptq with head":
                job["quantize"][0] |= {"evaluate": True, "eval_tokens": 512}
            ended = server.start(job, job)
            assert [code for code, _ in ended] == [0, 0], ended
            known[name] = folder / name
        return known[name]

    return make


def files(folder):
    kept = (f for f in Path(folder).rglob("*") if f.is_file() and f.name != "quantkit.run.json")
    return {str(f.relative_to(folder)): f.read_bytes() for f in kept}


@pytest.mark.parametrize(
    "name",
    [
        "gptq with head",
        pytest.param("smoothquant_plus", marks=pytest.mark.slow),
        pytest.param("static", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_what_one_gives(whole, given, tmp_path, name):
    """Up to what the order of a sum changes, which GPTQ carries on from layer to layer."""
    quantkit.quantize(**given(name, tmp_path / "one"))
    one, two = read_manifest(tmp_path / "one"), read_manifest(whole(name))
    assert two.identity == one.identity | {"processes": 2}
    assert two.tensors == one.tensors
    assert [each.name for each in two.layers] == [each.name for each in one.layers]
    for ours, theirs in zip(two.layers, one.layers, strict=True):
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=0.1), ours.name
        assert ours.details.keys() == theirs.details.keys()
    first = [each.relative_error for each in one.layers if each.name.startswith("model.layers.0.self_attn.q")]
    assert [two.layers[0].relative_error] == pytest.approx(first, rel=1e-3)
    chosen = [{k: each.get(k) for k in ("producer", "exponent", "alpha", "strength")} for each in one.scaling]
    assert chosen == [{k: each.get(k) for k in chosen[0]} for each in two.scaling] if chosen else True
    for ours, theirs in zip(two.searches or [], one.searches or [], strict=True):
        assert ours.strength == theirs.strength
        assert [t.loss for t in ours.trials] == pytest.approx([t.loss for t in theirs.trials], rel=1e-3)


@pytest.mark.parametrize(
    "calibrate", ["routed", *(pytest.param(each, marks=pytest.mark.slow) for each in ("top:3", "all"))]
)
def test_experts_are_calibrated_on_the_tokens_of_all_processes(server, given, tmp_path, calibrate):
    """With min_tokens, experts take tokens of others too, each process its share. Each expert is solved by one process,
    the fifth by both.
    """
    mixture = tiny_mixtures.build("mixtral", num_hidden_layers=1, num_local_experts=5)
    source = tiny_models.save(mixture, tmp_path / "mixtral")
    runs = {}
    for name in ("one", "two"):
        runs[name] = given("gptq with head", tmp_path / name, model=str(source))
        experts = {"calibrate": calibrate, "min_tokens": 24}
        transforms = [{"name": "awq", "grid": 2, "windows": 2}]
        runs[name]["recipe"] |= {"weights": GPTQ | {"group_size": 16}, "experts": experts, "rules": []}
        runs[name]["recipe"] |= {"transforms": transforms}
    quantkit.quantize(**runs["one"])
    ended = server.start({"quantize": [runs["two"]]}, {"quantize": [runs["two"]]})
    assert [code for code, _ in ended] == [0, 0], ended
    one, two = (read_manifest(tmp_path / name) for name in runs)
    assert two.tensors.keys() == one.tensors.keys()
    assert two.experts[0]["tokens"] == one.experts[0]["tokens"]
    for ours, theirs in zip(two.layers, one.layers, strict=True):
        assert ours.name == theirs.name
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=0.3, abs=1e-4), ours.name


@pytest.mark.slow
def test_a_run_without_text_is_that_of_one_process(whole, given, tmp_path):
    quantkit.quantize(**given("rtn", tmp_path / "one"))
    assert files(whole("rtn")) == files(tmp_path / "one")


def test_processes_share_the_closing_evaluation(whole, model):
    """The report is what one process finds on the same files."""
    found = read_manifest(whole("gptq with head")).evaluation
    alone = quantkit_eval.evaluate(
        quantkit.load(whole("gptq with head")),
        open_tokenizer(model),
        text=assets.evaluation_text(),
        baseline=quantkit.load(model),
        max_tokens=512,
        context=32,
    )
    assert found.windows == alone.windows == 16
    for field in ("kl_mean", "kl_mean_se", "kl_p99", "delta_nll_se", "top1_agreement"):
        assert getattr(found, field) == pytest.approx(getattr(alone, field), rel=1e-4), field


def test_a_killed_process_is_named_and_the_run_goes_on_after_it(server, whole, given, tmp_path):
    out = tmp_path / "out"
    job = {"quantize": [given("gptq with head", out)]}
    (first, said), (second, _) = server.start(job, job | {"kill": 1})
    assert second == -9
    assert first == 1
    assert re.search(r"ProcessLost: rank 1 \(\S+, pid \d+\) has died; what is finished is kept", said), said
    done = [entry["part"] for entry in read_lines(out / ".quantkit/journal.jsonl")[0][1:]]
    assert done == [0]
    assert not (out / "quantkit.json").exists()
    with pytest.raises(OutputError, match="processes: 2 -> null"):  # not with another number of processes
        quantkit.quantize(**given("gptq with head", out))
    ended = server.start(job, job)
    assert [code for code, _ in ended] == [0, 0], ended
    wanted = files(whole("gptq with head"))
    found = files(out)
    assert found.keys() == wanted.keys()
    assert {name for name in wanted if wanted[name] != found[name]} <= {"quantkit.json"}  # one was evaluated
    assert read_manifest(out).layers == read_manifest(whole("gptq with head")).layers


@pytest.mark.slow
def test_lost_hidden_states_of_one_process_make_all_start_again(server, whole, given, tmp_path):
    out = tmp_path / "out"
    job = {"quantize": [given("gptq with head", out)]}
    server.start(job, job | {"kill": 1})
    (out / ".quantkit/streams-00001-rank-1.safetensors").unlink()
    ended = server.start(job, job)
    assert [code for code, _ in ended] == [0, 0], ended
    assert read_manifest(out).layers == read_manifest(whole("gptq with head")).layers


def test_an_error_in_one_process_ends_all_and_the_first_one_says_it(server, given, tmp_path, inputs, model):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"weights: {{preset: W4A16, group_size: 32, algorithm: gptq}}\n"
        f"calibration: {{data: ['{inputs / 'text'}'], samples: 4, sequence_length: 32}}\n"
    )
    job = {"command": ["quantize", str(recipe), "--model", str(model), "--no-eval"]}
    job["command"] += ["--output", str(tmp_path / "out")]
    (first, said), (second, silent) = server.start(job, job | {"fail": 1})
    assert (first, second) == (1, 1)
    assert re.search(r"quantkit: rank 1 \(\S+, pid \d+\) has failed: a test wants it; what is fini", said), (
        said
    )
    assert "Traceback" not in said
    assert silent == ""


def test_fewer_windows_than_processes_are_refused(server, given, tmp_path):
    job = {"quantize": [given("gptq with head", tmp_path / "out")]}
    job["quantize"][0]["recipe"]["calibration"] |= {"samples": 1}
    ended = server.start(job, job)
    assert all("DataError: 1 calibration windows are fewer than the 2 processes" in said for _, said in ended)
    assert not (tmp_path / "out").exists()


def test_a_wrong_input_is_said_once(server, tmp_path):
    job = {"command": ["quantize", "w4a16-gptq", "--model", str(tmp_path / "nowhere")]}
    (first, said), (second, silent) = server.start(job, job)
    assert (first, second) == (2, 2)
    assert "nowhere" in said
    assert silent == ""


@pytest.mark.slow
def test_torchrun_starts_a_run(given, tmp_path, inputs, model):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "weights: {preset: W4A16, group_size: 32, algorithm: gptq}\n"
        f"calibration: {{data: ['{inputs / 'text'}'], samples: 4, sequence_length: 32}}\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-m", "quantkit", "quantize", str(recipe), "--model", str(model)]
    command += ["--eval-tokens", "512", "--output", str(tmp_path / "out"), "--json", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("files:") == 1
    assert read_manifest(tmp_path / "out").identity["processes"] == 2
    assert not (tmp_path / "out/.quantkit").exists()
