"""`budget`: a run with less memory writes the same bytes, and what cannot be is refused before it begins."""

import json
import subprocess
import sys

import pytest
import tiny_mixtures
import tiny_models

import quantkit
from quantkit import assets
from quantkit.calibration.spill import Spill
from quantkit.errors import RecipeError
from quantkit.models.headers import read_checkpoint
from quantkit.plan import build_plan
from quantkit.predict.budget import settled
from quantkit.predict.memory import HELD, LEAST, USUAL, memory_of
from quantkit.recipe.recipe import load_recipe, parse_recipe

pytestmark = pytest.mark.usefixtures("steady")

WEIGHTS = {"bits": 4, "group_size": 32}
CALIBRATION = {"samples": 6, "sequence_length": 32}
GPTQ = {"weights": WEIGHTS | {"algorithm": "gptq"}, "calibration": CALIBRATION}
SEARCH = {"name": "smoothquant_plus", "search_windows": 4}
RECIPES = {
    "gptq": GPTQ,
    "gptq with head, not sequential": {
        "weights": WEIGHTS | {"algorithm": {"name": "gptq", "true_sequential": False}},
        "rules": [{"match": "lm_head", "bits": 8}],
        "calibration": CALIBRATION,
    },
    "search": {
        "weights": WEIGHTS | {"algorithm": {"name": "rtn", "range": "minmax"}},
        "transforms": [SEARCH],
        "calibration": CALIBRATION,
    },
}


@pytest.fixture
def spills(monkeypatch):
    """Every file that hidden states were put into."""
    made = []

    def noted(self, folder, before=Spill.__init__):
        before(self, folder)
        made.append(self)

    monkeypatch.setattr(Spill, "__init__", noted)
    return made


def peaks(recipe, model):
    """(usual, least) predicted peak of a run."""
    headers = read_checkpoint(model)
    plan = build_plan(recipe, headers)
    return memory_of(recipe, plan, headers, USUAL).peak, memory_of(recipe, plan, headers, LEAST).peak


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "quantkit.run.json"}


def made(recipe, model, output, **changes):
    quantkit.quantize(recipe | changes, model=model, output=output, evaluate=False, device="cpu")
    return files(output)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return tiny_models.save(tiny_mixtures.build("mixtral"), tmp_path_factory.mktemp("mixture"))


@pytest.mark.parametrize(
    "name",
    ["gptq", *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name != "gptq"), "mixture"],
)
def test_a_budget_changes_no_byte(name, inputs, mixture, tmp_path, spills):
    recipe, model = (GPTQ, mixture) if name == "mixture" else (RECIPES[name], inputs / "model")
    usual, least = peaks(parse_recipe(recipe), model)
    assert least < usual
    before = made(recipe, model, tmp_path / "usual")
    assert not spills
    after = made(recipe, model, tmp_path / "least", budget={"ram": least})
    assert spills
    assert sum(each.size for each in spills) > 0
    assert after == before
    facts = json.loads((tmp_path / "least" / "quantkit.run.json").read_text())
    assert facts["budget"] == {"ram": least}
    assert facts["predicted_bytes"]["quantize"] <= least
    assert facts["peak_bytes"]["quantize"] == facts["peak_rss_bytes"] > 10**8
    assert not (tmp_path / "least" / ".quantkit").exists()


def test_an_interrupted_run_goes_on_within_another_budget(inputs, tmp_path, monkeypatch, spills):
    from quantkit.pipeline.shard_writer import ShardWriter

    whole = made(GPTQ, inputs / "model", tmp_path / "whole")
    _, least = peaks(parse_recipe(GPTQ), inputs / "model")
    commit = ShardWriter.commit

    def stopped(self, part, *arguments):
        commit(self, part, *arguments)
        if part == 1:
            raise KeyboardInterrupt

    for first, then in (({"ram": least}, {"ram": "100GB"}), ({"disk": "1GB"}, {"ram": least})):
        output = tmp_path / f"{len(spills)}"
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "commit", stopped)
            with pytest.raises(KeyboardInterrupt):
                made(GPTQ, inputs / "model", output, budget=first)
        assert made(GPTQ, inputs / "model", output, budget=then) == whole
    assert len(spills) == 2  # of four runs


def test_an_evaluation_that_a_budget_has_no_room_for_takes_no_memory_before_it_is_refused(
    inputs, tmp_path, monkeypatch
):
    """How long it would take is found by probes, which take memory too."""
    probes = []
    monkeypatch.setattr(
        "quantkit.pipeline.tracker.Tracker._probe", lambda self, call: probes.append(call) or 1.0
    )
    quantkit.quantize(GPTQ | {"budget": {"ram": "20GB"}}, inputs / "model", tmp_path / "roomy", device="cpu")
    assert probes
    probes.clear()
    monkeypatch.setattr("quantkit.predict.sizes.EVALUATION", 1e6)
    result = quantkit.quantize(
        GPTQ | {"budget": {"ram": "2GB"}}, inputs / "model", tmp_path / "narrow", device="cpu"
    )
    assert not probes
    assert "more than budget.ram allows" in "".join(result.report.notes)


def test_a_budget_that_cannot_be_is_refused_with_the_least(inputs, tmp_path):
    _, least = peaks(parse_recipe(GPTQ), inputs / "model")
    budget = {"ram": least - 1, "disk": 1000}
    with pytest.raises(RecipeError) as refused:
        made(GPTQ, inputs / "model", tmp_path / "out", budget=budget)
    ram, disk = str(refused.value).splitlines()
    assert ram.startswith("budget.ram:")
    assert f"takes {least / 2**20:.2f} MiB" in ram
    assert disk.startswith("budget.disk: 1000 B is too little")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="in memory"):
        quantkit.quantize_in_memory(GPTQ | {"budget": {"ram": "8GiB"}}, model=inputs / "model")


def test_more_is_saved_the_less_there_is():
    recipe, headers = load_recipe("w4a16-gptq"), read_checkpoint(assets.mixture_model())
    plan = build_plan(recipe, headers)
    usual, least = (memory_of(recipe, plan, headers, ways).peak for ways in (USUAL, LEAST))
    found = []
    for limit in range(least, usual + 1_000_001, (usual - least) // 12):
        bounded = recipe.model_copy(update={"budget": parse_recipe(GPTQ | {"budget": {"ram": limit}}).budget})
        ways, prediction = settled(bounded, plan, headers)
        assert prediction.memory <= limit
        found.append((not ways.spilled, ways.kept is None, ways.kept or 0, ways.held))
    assert found == sorted(found)
    assert found[0][:2] == (False, False)
    assert found[-1] == (True, True, 0, HELD)


# The address space may grow by `sys.argv[3]` bytes over that of a run with hardly any text.
_BOUNDED = """
import re, resource, sys
import torch
import quantkit
from quantkit.errors import OutOfMemory
torch.set_num_threads(1)
gptq = {"name": "gptq", "refine": 0, "range": "minmax"}
def run(output, samples, **changes):
    calibration = {"samples": samples, "sequence_length": 128, "data": [sys.argv[1] + "/text"]}
    recipe = {"weights": {"bits": 4, "group_size": 32, "algorithm": gptq}, "calibration": calibration} | changes
    quantkit.quantize(recipe, sys.argv[1] + "/model", output, evaluate=False, device="cpu")
run(sys.argv[2] + "/small", 2)
size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    run(sys.argv[2] + "/large", 1200, **({"budget": {"ram": sys.argv[4]}} if sys.argv[4:] else {}))
except OutOfMemory:
    sys.exit(9)
"""


@pytest.mark.slow
def test_under_a_limit_of_the_system_a_run_ends_only_with_a_budget(inputs, tmp_path):
    (inputs / "text").write_text(assets.calibration_text().read_text()[:400_000])

    def ended(name, *budget):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", _BOUNDED, str(inputs), str(tmp_path / name), str(190 << 20), *budget]
        return subprocess.run(command, capture_output=True, text=True)

    without = ended("without")
    assert without.returncode == 9, without.stderr
    within = ended("within", "620MB")
    assert within.returncode == 0, within.stderr
    small, large = (
        json.loads((tmp_path / "within" / name / "quantkit.run.json").read_text())["peak_bytes"]["quantize"]
        for name in ("small", "large")
    )
    assert large - small <= 80e6
