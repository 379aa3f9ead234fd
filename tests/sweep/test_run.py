"""A sweep of a tiny model: what cells share is exact, what is finished is kept, and a failed cell is a result."""

import json
from dataclasses import replace

import pytest
import tiny_models
import torch

from quantkit import assets
from quantkit.calibration.kept_statistics import merge, open_statistics
from quantkit.calibration.text import Windows
from quantkit.checkpoint.load import load
from quantkit.errors import DataError, NumericalError, OutputError, RunError
from quantkit.pipeline.progress import Silent
from quantkit.pipeline.quantize import prepared, quantize
from quantkit.pipeline.statistics import RECIPE, collect_statistics, with_statistics
from quantkit.sweep import cell as one_cell
from quantkit.sweep import run as module
from quantkit.sweep.run import sweep
from quantkit.sweep.table import decided

OTHERS = ("rtn", "awq", "awq+gptq", "smoothquant_plus")
SPEEDS = ("tokens_per_s", "times_original")
SHARED = {"preset": "INT8", "followed": False}, {"preset": "FP8", "followed": False}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny_models.save(
        tiny_models.FAMILIES["llama-gqa"](num_hidden_layers=2), folder / "model", dtype=torch.bfloat16
    )
    text = assets.calibration_text().read_text()
    (folder / "text").write_text(text[:8000])
    (folder / "other").write_text(text[8000:16000])
    return folder


@pytest.fixture
def asked(inputs):
    def make(*methods, kv=("none",), **changes):
        return {
            "recipe": {
                "weights": {"group_size": 32, "symmetric": False},
                "calibration": {"data": [str(inputs / "text")], "samples": 4, "sequence_length": 32},
            },
            "grid": {"methods": list(methods), "bits": [4], "kv_cache": list(kv)},
            "evaluation": {"tokens": 256, "text": [str(inputs / "other")]},
            "speed": False,
            "context": 64,
        } | changes

    return make


def weights(result):
    return {cell["id"]: cell["weights_sha256"] for cell in result["cells"]}


def without_times(result):
    result = json.loads(json.dumps(result))
    for key in ("seconds", "date", "statistics"):
        del result[key]
    for cell in result["cells"]:
        for key in ("seconds", "steps", "peak_rss_bytes", "peak_rss_measured_bytes", "shared"):
            del cell[key]
    return result


@pytest.mark.parametrize("method", [pytest.param(name, marks=pytest.mark.slow) for name in ("gptq", *OTHERS)])
def test_cells_that_share_weights_are_those_of_separate_runs(inputs, asked, tmp_path, method):
    """Sharing leaves every number as it is; only files and scales of a cache that a cell does not use are another's."""
    written = asked(method, kv=["none", *SHARED])
    shared = sweep(written, inputs / "model", tmp_path / "shared")
    alone = sweep(written, inputs / "model", tmp_path / "alone", share=False)
    sources = [cell["shared"]["weights_of"] for cell in shared["cells"]]
    assert sources.count(f"w4-{method}-kv-fp8") == 2
    assert all(cell["shared"]["weights_of"] is None for cell in alone["cells"])
    for result in (shared, alone):
        for cell in result["cells"]:
            del cell["weights_sha256"]  # of files that hold the scales of a cache, or do not
            cell["notes"] = []
    assert without_times(shared) == without_times(alone)
    assert not (tmp_path / "shared" / "work").exists()


def test_finished_cells_are_not_made_again(inputs, asked, tmp_path, monkeypatch):
    written = asked("rtn", "gptq")
    first = sweep(written, inputs / "model", tmp_path / "s")
    made = []
    monkeypatch.setattr(module, "run_cell", lambda job: made.append(job.id))
    assert without_times(sweep(written, inputs / "model", tmp_path / "s")) == without_times(first)
    assert made == []
    file = tmp_path / "s" / "cells" / "w4-rtn.json"
    file.write_text(file.read_text().replace("finished", "failed"))  # no longer what was written
    with pytest.raises(RunError, match="1 of 2 cells are not finished: w4-rtn"):
        sweep(written, inputs / "model", tmp_path / "s")
    assert made == ["w4-rtn"]
    made.clear()
    with pytest.raises(RunError, match="2 of 2"):
        sweep(asked("rtn", "gptq", evaluation={"tokens": 128}), inputs / "model", tmp_path / "s")
    assert made == ["w4-rtn", "w4-gptq"]  # evaluated on another text
    made.clear()
    monkeypatch.setattr(module, "SCHEMA", "quantkit-sweep-cell/next")
    with pytest.raises(RunError, match="2 of 2"):
        sweep(written, inputs / "model", tmp_path / "s")
    assert made == ["w4-rtn", "w4-gptq"]  # files of an earlier form


def test_a_collapsed_cell_is_a_result_and_those_that_share_it_fail_with_it(
    inputs, asked, tmp_path, monkeypatch
):
    def collapses(*args, **options):
        made.append(1)
        raise NumericalError("model.layers.0.mlp.up_proj: collapsed")

    made = []
    monkeypatch.setattr(one_cell, "quantize", collapses)
    result = sweep(asked("rtn", kv=["none", "INT8"]), inputs / "model", tmp_path / "s")
    assert [each["status"] for each in result["cells"]] == ["failed", "failed"]
    assert all("collapsed" in each["reason"] for each in result["cells"])
    assert len(made) == 1
    assert result["pareto"] == {"size": [], "memory": [], "decode": []}


def test_the_report_is_the_file_and_answers_both_ways(inputs, asked, tmp_path):
    written = asked("rtn", "gptq", speed=True)
    written["grid"]["bits"] = [8, 2]
    result = sweep(written, inputs / "model", tmp_path / "s", keep=True)
    assert json.loads((tmp_path / "s" / "sweep.json").read_text()) == json.loads(json.dumps(result))
    pair = decided(result, "w8-rtn", "w2-rtn")
    assert pair["better"] == "yes"
    assert decided(result, "w2-rtn", "w8-rtn")["better"] == "no"
    assert pair["difference"] == -decided(result, "w2-rtn", "w8-rtn")["difference"] < 0
    assert result["decisions"]["comparisons"] == 6
    for cell in result["cells"]:
        report, window = cell["evaluation"], cell["per_window"]
        assert sum(window["kl"]) / sum(window["tokens"]) == pytest.approx(report["kl_mean"])
        speed = cell["speed"]
        assert min(speed[f"{phase}_{what}"] for phase in ("prefill", "decode") for what in SPEEDS) > 0
    assert "w8-gptq" in result["pareto"]["size"] or "w8-rtn" in result["pareto"]["size"]
    (folder,) = (tmp_path / "s" / "work").glob("w2-rtn-*")
    load(folder)


def test_a_folder_in_use_is_refused(inputs, asked, tmp_path):
    with module._locked(tmp_path / "s"), pytest.raises(OutputError, match="in use by another sweep"):
        sweep(asked("rtn"), inputs / "model", tmp_path / "s")


ORIGINAL = {"name": "original", "algorithm": {"name": "gptq", "stream": "original"}}
WEIGHTED = {"name": "weighted", "algorithm": {"name": "rtn", "range": "weighted"}}
FLAT = {"transforms": [{"name": "smoothquant_plus", "search_windows": 2}], "algorithm": "rtn"}


@pytest.mark.slow
def test_statistics_collected_once_change_nothing(inputs, asked, tmp_path):
    methods = [ORIGINAL, WEIGHTED, "smoothquant", "smoothquant+gptq", FLAT | {"name": "plus"}, "awq"]
    shared = sweep(asked(*methods), inputs / "model", tmp_path / "shared")
    alone = sweep(asked(*methods), inputs / "model", tmp_path / "alone", share=False)
    assert weights(shared) == weights(alone)
    (used,) = shared["statistics"]
    assert used["cells"] == ["w4-original", "w4-weighted", "w4-smoothquant", "w4-smoothquant+gptq", "w4-plus"]
    assert used["tokens"] == 4 * 32
    assert alone["statistics"] == []
    again = sweep(asked(*methods), inputs / "model", tmp_path / "again", statistics=[tmp_path / "kept"])
    assert weights(again) == weights(shared)
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_a_cell_with_kept_statistics_is_that_of_a_run_of_its_own(inputs, asked, tmp_path):
    found = [sweep(asked(ORIGINAL), inputs / "model", tmp_path / name, share=name == "s") for name in "st"]
    assert weights(found[0]) == weights(found[1])
    assert [len(result["statistics"]) for result in found] == [1, 0]


def test_a_walk_with_kept_statistics_carries_one_window(inputs, asked, tmp_path):
    """What is saved: the other windows never run through the model."""
    run = run_on(inputs, asked, tmp_path / "x", "text")
    assert run.wanted.full == 4
    collect_statistics(run, tmp_path / "kept")
    kept = with_statistics(run, tmp_path / "kept")
    assert (kept.wanted.full, kept.wanted.quantized) == (1, False)
    assert kept.identity == run.identity


def test_kept_sets_are_used_beside_collected_ones(inputs, asked, tmp_path, monkeypatch):
    """With a calibrated cache, RTN's ranges are of the quantized stream, and so collected, beside GPTQ's kept sums."""
    monkeypatch.setattr(
        "quantkit.calibration.walk.CHUNK_ELEMENTS", 1
    )  # several chunks, and one original window
    kept = collected(inputs, asked, tmp_path / "kept", "text")
    recipe = asked("rtn")["recipe"] | {
        "weights": {
            "algorithm": {"name": "gptq", "stream": "original", "true_sequential": False},
            "group_size": 32,
        },
        "rules": [{"match": "*.o_proj", "algorithm": {"name": "rtn", "range": "weighted"}}],
        "kv_cache": "FP8_TENSOR",
    }
    found = []
    for name, folder in (("alone", None), ("with", kept.folder)):
        result = quantize(
            recipe, inputs / "model", tmp_path / name, device="cpu", evaluate=False, statistics=folder
        )
        found.append({path: file.sha256 for path, file in result.manifest.files.items() if "model" in path})
    assert found[0] == found[1]


def run_on(inputs, asked, folder, *names):
    """A run that looks at the windows of some texts, one after the other."""
    calibration = asked("rtn")["recipe"]["calibration"]
    runs = [
        prepared(
            RECIPE | {"calibration": calibration | {"data": [str(inputs / name)]}},
            inputs / "model",
            folder,
            (),
            "cpu",
            None,
            Silent(),
        )
        for name in names
    ]
    windows = Windows(torch.cat([run.windows.ids for run in runs]), " ".join(names), [])
    return runs[0] if len(runs) == 1 else replace(runs[0], windows=windows)


def collected(inputs, asked, folder, *names):
    return collect_statistics(run_on(inputs, asked, folder, *names), folder)


def test_sets_of_several_texts_add_up(inputs, asked, tmp_path):
    parts = [collected(inputs, asked, tmp_path / name, name) for name in ("text", "other")]
    whole = collected(inputs, asked, tmp_path / "whole", "text", "other")
    merged = merge(parts, tmp_path / "merged")
    assert merged.tokens == whole.tokens
    for name in whole.linears:
        one, other = (
            each.of(name, ("hessian", "amax", "mean_abs", "mean_square")) for each in (merged, whole)
        )
        torch.testing.assert_close(one.hessian, other.hessian, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.mean_abs, other.mean_abs)
        torch.testing.assert_close(one.mean_square, other.mean_square)
        assert torch.equal(one.amax, other.amax)
        assert torch.equal(one.fired, other.fired)
    with pytest.raises(DataError, match="count twice"):
        merge([parts[0], merged], tmp_path / "twice")


def test_merged_statistics_are_used_for_every_text_and_recorded(inputs, asked, tmp_path):
    a, b = (collected(inputs, asked, tmp_path / name, name) for name in ("text", "other"))
    result = sweep(
        asked(ORIGINAL), inputs / "model", tmp_path / "s", statistics=[a.folder, b.folder], keep=True
    )
    (used,) = result["statistics"]
    assert used["data"] == sorted(a.data + b.data)
    (folder,) = (tmp_path / "s" / "work").iterdir()
    assert json.loads((folder / "quantkit.json").read_text())["identity"]["statistics"] == " ".join(
        used["data"]
    )
    one = sweep(asked(ORIGINAL), inputs / "model", tmp_path / "t", statistics=[a.folder])
    assert weights(one) != weights(result)


def test_statistics_of_another_model_are_refused(inputs, asked, tmp_path):
    kept = collected(inputs, asked, tmp_path / "kept", "text")
    other = tiny_models.FAMILIES["llama-gqa"](num_hidden_layers=2, rms_norm_eps=1e-4)
    tiny_models.save(other, tmp_path / "model", dtype=torch.bfloat16)
    recipe = asked("rtn")["recipe"] | {
        "weights": {"algorithm": {"name": "gptq", "stream": "original"}, "group_size": 32}
    }
    with pytest.raises(DataError, match="another model"):
        quantize(recipe, tmp_path / "model", tmp_path / "o", evaluate=False, statistics=kept.folder)
    with pytest.raises(DataError, match="holds no statistics"):
        open_statistics(tmp_path / "model")
