"""Sweeps as they are written: their cells, their names, and every mistake at once."""

import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import assets
from quantkit.errors import RecipeError
from quantkit.models.headers import read_checkpoint
from quantkit.sweep.grid import load_sweep, of_command_line, parse_sweep
from quantkit.sweep.share import in_order, plan_cells

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def ids(mapping):
    return [cell.id for cell in parse_sweep(mapping).cells]


def test_a_grid_is_every_combination():
    found = parse_sweep(
        {
            "recipe": {"weights": {"symmetric": False}, "calibration": {"samples": 4}},
            "grid": {"methods": ["rtn", "awq+gptq"], "bits": [4, 3], "kv_cache": ["none", "INT8"]},
        }
    )
    assert len(found.cells) == 8
    cell = next(cell for cell in found.cells if cell.id == "w3-awq+gptq-kv-int8")
    assert cell.factors == {"method": "awq+gptq", "bits": 3, "kv_cache": "INT8"}
    assert (cell.recipe.weights.bits, cell.recipe.weights.symmetric) == (3, False)
    assert (cell.recipe.weights.algorithm.name, cell.recipe.transforms[0].name) == ("gptq", "awq")
    assert cell.recipe.calibration.samples == 4
    assert cell.recipe.kv_cache.preset == "INT8"


def test_names_say_what_is_varied_and_nothing_else():
    assert ids({"grid": {"methods": ["rtn"], "bits": [4]}}) == ["w4-rtn"]
    assert ids({"grid": {"methods": ["rtn"], "bits": [4], "group_size": [64, "channel"]}}) == [
        "w4-g64-rtn",
        "w4-channel-rtn",
    ]
    own = {"name": "mine", "transforms": ["awq"], "algorithm": {"name": "gptq", "damping": 0.1}}
    grid = {"methods": [own], "bits": [2], "inputs": ["none", {"number": "int8"}]}
    assert ids({"grid": grid}) == ["w2-mine-a-none", "w2-mine-a-int8"]
    alone = {"preset": "FP8", "followed": False}
    assert ids({"grid": {"kv_cache": ["none", alone]}}) == ["rtn-kv-none", "rtn-kv-fp8"]
    assert ids({"grid": {"kv_cache": ["FP8", alone]}}) == ["rtn-kv-fp8", "rtn-kv-fp8-followed-false"]


def test_cells_of_their_own_stand_beside_the_grid():
    written = {
        "grid": {"methods": ["rtn"]},
        "cells": [{"name": "kv", "recipe": {"weights": "none", "kv_cache": "INT8"}}],
    }
    assert ids(written) == ["rtn", "kv"]


def test_every_mistake_is_named_at_once(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("grid:\n  methods: [gptqq, awq]\n  bits: [4, 9]\nspeed: true\n")
    with pytest.raises(RecipeError) as error:
        load_sweep(file)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "s.yaml:2: grid.methods.0: unknown method; did you mean `gptq`?" in lines[0]
    assert "cell w9-awq: weights.bits" in lines[1]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({}, "neither a grid nor cells"),
        ({"grid": {"bitz": 3}}, "grid.bitz: unknown key; did you mean `bits`?"),
        ({"grid": {"methods": ["gptq+awq"]}}, "one algorithm may stand behind the transforms"),
        ({"grid": {"methods": ["rtn", "rtn"]}}, "two cells are called rtn"),
        ({"grid": {"methods": [{"name": "../x"}]}}, "a name of letters"),
        ({"cells": [{"name": "a/b", "recipe": {}}]}, "cells.0.name"),
        ({"grid": {"bits": [2, 3, 4, 5, 6, 7, 8], "group_size": list(range(16, 400))}}, "2,688 cells"),
        ({"recipe": {"weight": {}}, "grid": {"methods": ["rtn"]}}, "cell rtn: weight: unknown key"),
    ],
)
def test_mistakes(written, said):
    with pytest.raises(RecipeError, match=said.replace("?", r"\?").replace("(", r"\(")):
        parse_sweep(written)


def test_the_short_form_is_the_same_sweep():
    short = of_command_line(
        None, "rtn,awq+gptq", {"bits": "4,3", "kv_cache": "none,fp8", "group_size": None}, None
    )
    grid = {"methods": ["rtn", "awq+gptq"], "bits": [4, 3], "kv_cache": ["none", "FP8"]}
    assert short == parse_sweep({"grid": grid})
    with pytest.raises(RecipeError, match="the file"):
        of_command_line("x.yaml", "rtn", {}, None)
    with pytest.raises(RecipeError, match="nothing to sweep over"):
        of_command_line(None, None, {"bits": None}, None)


def planned(kv, methods=("rtn", "gptq"), **options):
    grid = {"methods": list(methods), "bits": [4], "kv_cache": kv}
    cells = parse_sweep({"grid": grid}).cells
    return plan_cells(cells, read_checkpoint(assets.default_model()), **options)


def test_weights_are_shared_where_they_are_the_same():
    """RTN does not look at the cache; GPTQ does, unless it is told not to follow it."""
    source = {each.cell.id: each.source for each in planned(["none", "INT8", "FP8"])}
    assert {source[f"w4-rtn-kv-{kv}"] for kv in ("none", "int8", "fp8")} == {"w4-rtn-kv-fp8"}
    assert all(source[f"w4-gptq-kv-{kv}"] == f"w4-gptq-kv-{kv}" for kv in ("none", "int8", "fp8"))
    alone = [{"preset": name, "followed": False} for name in ("INT8", "FP8", "FP8_TENSOR")]
    source = {each.cell.id: each.source for each in planned(["none", *alone])}
    assert {source[f"w4-gptq-kv-{kv}"] for kv in ("none", "int8", "fp8")} == {"w4-gptq-kv-fp8"}
    assert source["w4-gptq-kv-fp8_tensor"] == "w4-gptq-kv-fp8_tensor"  # scales of its own to calibrate
    original = {"name": "o", "algorithm": {"name": "gptq", "stream": "original"}}
    assert {each.source for each in planned(["none", "INT8"], [original])} == {"w4-o-kv-none"}
    assert all(not each.shares for each in planned(["none", "INT8"], share=False))


def test_cells_that_share_weights_follow_the_one_that_makes_them():
    order = in_order(planned(["none", "INT8", "FP8"], ["rtn"]))
    assert [each.shares for each in order] == [False, True, True]


def test_what_does_not_fit_the_model_is_named_for_every_cell():
    cells = parse_sweep({"grid": {"methods": ["rtn", "gptq"], "group_size": [48]}}).cells
    with pytest.raises(RecipeError, match=r"(?s)cell rtn: .*48.*cell gptq: .*48"):
        plan_cells(cells, read_checkpoint(assets.default_model()))


def test_a_search_of_bits_is_no_cell():
    searched = {"target": {"bits_per_weight": 4.0}}
    cells = parse_sweep({"recipe": searched, "grid": {"methods": ["rtn", "gptq"]}}).cells
    with pytest.raises(
        RecipeError, match=r"(?s)cell rtn: target.bits_per_weight: .*cell gptq: .* cannot be swept"
    ):
        plan_cells(cells, read_checkpoint(assets.default_model()))


def test_a_dry_run_lists_the_cells_without_torch():
    code = (
        "import sys; from quantkit.cli.main import run; run(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    asked = ["sweep", "--methods", "rtn,gptq", "--bits", "4", "--kv", "none,INT8", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "those of w4-rtn-kv-none" in done.stdout
    assert "4 cells, 3 quantizations" in done.stdout


@pytest.mark.parametrize(
    ("name", "count", "made"), [("sweep.yaml", 60, 20), ("streams.yaml", 10, 8)], ids=["sweep", "streams"]
)
def test_an_example_has_the_cells_that_the_docs_name(name, count, made):
    cells = load_sweep(EXAMPLES / name).cells
    planned = plan_cells(cells, read_checkpoint(assets.default_model()))
    assert len(planned) == count
    assert len({each.source for each in planned}) == made
