"""The comparison on the embedded mixture: what is run, what the rival is asked, how the table is written."""

import json
import sys

import pytest
import torch

from quantkit import assets
from quantkit.bench.quality import methods, mixtures
from quantkit.recipe.recipe import parse_recipe

FIT = {"perplexity": 80.0, "perplexity_se": 2.0}
FEW = {
    "calibration": {"samples": 8, "sequence_length": 128}
}  # fewer, and every expert is filled up with all tokens
RIVAL = f"""#!{sys.executable}
import json, shutil, sys
isolated, script, model, windows, method, save, bits, group = sys.argv[1:]
assert isolated == "-I" and script.endswith("oneshot.py") and method == "gptq"
assert [len(w) for w in json.load(open(windows))] == 8 * [128]
shutil.copytree(model, save)
print("chatter")
print(json.dumps({{"cpu_seconds": int(bits), "versions": {{"theirs": "1"}}}}))
"""


def row(method, bits, **more):
    e = {"original": FIT, "quantized": FIT, "delta_nll": 0.01, "delta_nll_se": 0.002}
    e |= {"kl_mean": 0.005, "kl_mean_se": 0.001, "top1_agreement": 0.9}
    return {
        "method": method,
        "bits": bits,
        "group": 128,
        "commit": "abc",
        "cpu_seconds": 7,
        "evaluation": e,
    } | more


def test_every_method_is_a_recipe_and_differs_in_what_it_says():
    recipes = {name: parse_recipe(recipe) for name, recipe in mixtures.METHODS.items()}
    assert recipes["GPTQ, routed"].experts.calibrate == "routed"
    assert recipes["GPTQ, all"].experts.calibrate == "all"
    assert recipes["RTN"].weights.algorithm.range == "minmax"
    assert [t.name for t in recipes["AWQ + GPTQ, routed"].transforms] == ["awq"]


def test_the_table_has_every_row_by_bits_and_the_pairs_below():
    other = row("GPTQ, all", 4)["evaluation"] | {"delta_nll": -0.25, "delta_nll_se": 0.125}
    rows = [row("RTN", 3), row("RTN", 4), row("GPTQ, all", 4, against_routed=other)]
    where = {"cpu": "A", "torch": "2", "threads": 1, "date": "2026-11-29T10:00"}
    text = mixtures.markdown(rows, where)
    table = [line for line in text.splitlines() if line.startswith("| W")]
    assert [line.split("|")[1:3] for line in table] == [
        [" W4 g128 ", " RTN "],
        [" W4 g128 ", " GPTQ, all "],
        [" W3 g128 ", " RTN "],
    ]
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "W4 -0.2500 ± 0.1250" in text


@pytest.mark.slow
def test_rows_are_measured_once_and_the_rival_gets_the_same_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(mixtures, "BITS", ((4, 128),))
    monkeypatch.setattr(methods, "WINDOWS", 2)
    monkeypatch.setattr(methods, "KL_WINDOWS", 2)
    python = tmp_path / "python"
    python.write_text(RIVAL)
    python.chmod(0o755)
    work = tmp_path / "work"
    threads = torch.get_num_threads()
    rows = mixtures.measure(work, ("RTN", "GPTQ, routed", "GPTQ, all"), str(python), overrides=FEW)
    assert torch.get_num_threads() == threads
    by_name = {row["method"]: row for row in rows}
    assert by_name["GPTQ, routed"]["evaluation"]["kl_mean"] < by_name["RTN"]["evaluation"]["kl_mean"]
    assert by_name["GPTQ, all"]["against_routed"]["delta_nll"] != 0
    theirs = by_name[mixtures.RIVAL]
    assert theirs["evaluation"]["kl_mean"] < 1e-6  # the program above "quantizes" nothing
    assert (theirs["cpu_seconds"], theirs["versions"]) == (4, {"theirs": "1"})
    before = (work / "rows.jsonl").read_text()
    assert mixtures.measure(work, ("RTN", "GPTQ, routed", "GPTQ, all"), str(python), overrides=FEW) == rows
    assert (work / "rows.jsonl").read_text() == before
    assert json.loads(before.splitlines()[0])["method"] == "RTN"


def test_the_model_is_the_embedded_mixture_unless_another_is_given(tmp_path, monkeypatch):
    opened = []

    class Stop(Exception):
        pass

    def measured(work, model):
        opened.append(model)
        raise Stop

    monkeypatch.setattr(mixtures, "Measured", measured)
    for model in (None, tmp_path):
        with pytest.raises(Stop):
            mixtures.measure(tmp_path / "work", model=model)
    assert opened == [assets.mixture_model(), tmp_path]
