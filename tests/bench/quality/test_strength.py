"""The page of SmoothQuant+ says what was measured: its plot and tables are those of the committed JSON."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from quantkit.bench.quality.strength import markdown
from quantkit.bench.quality.strength_plot import plot

DOCS = Path(__file__).parents[3] / "docs"
TRIALS = [{"loss": 0.01, "loss_se": 0.001, "over_chosen": 0.004, "over_chosen_se": 0.001}]
TRIALS += [TRIALS[0] | {"strength": step / 4, "loss": 0.006 + 0.01 * abs(step - 2)} for step in range(5)]
VALUES = {"kl": [0.006, 0.0002], "nll": [0.004, 0.001]}
ROW = {
    "model": "tiny",
    "search": {"strength": 0.5, "trials": TRIALS},
    "methods": {"RTN": VALUES, "SmoothQuant+": VALUES},
    "plus_minus": {"RTN": {"kl": [-0.001, 0.0001], "nll": [-0.002, 0.001]}},
}


def test_the_plot_has_a_point_for_every_strength_and_a_line_for_none():
    root = ElementTree.fromstring(plot([ROW, ROW]))
    names = [each.tag.rpartition("}")[2] for each in root.iter()]
    assert names.count("circle") == 2 * 5
    assert names.count("polyline") == 2
    assert sum("stroke-dasharray" in each.attrib for each in root.iter()) == 2
    heights = [float(c.attrib["cy"]) for c in root.iter() if c.tag.endswith("circle")][:5]
    assert heights[2] == max(heights)  # the least loss is lowest


def test_the_table_has_each_method_and_its_paired_difference():
    lines = markdown([ROW]).splitlines()
    assert lines[0].startswith("| tiny, strength 0.5 |")
    assert lines[2] == "| RTN | 6.000 ± 0.200 | 4.000 ± 1.000 | -1.000 ± 0.100 | -2.000 ± 1.000 |"
    assert lines[3] == "| SmoothQuant+ | 6.000 ± 0.200 | 4.000 ± 1.000 |  |  |"


@pytest.fixture
def measured():
    return json.loads((DOCS / "benchmarks/strength.json").read_text())["rows"]


def test_the_page_shows_what_was_measured(measured):
    assert markdown(measured).strip() in (DOCS / "smoothquant-plus.md").read_text()
    assert plot(measured) == (DOCS / "benchmarks/strength.svg").read_text()


def test_coarse_then_fine_finds_what_all_strengths_find(measured):
    """On both models; where it stops beside the least, by no more than the error of the difference."""
    from quantkit.recipe.recipe import TRANSFORMS
    from quantkit.transforms.smoothquant_plus import following

    for row in measured:
        losses = {t.get("strength"): t for t in row["search"]["trials"]}
        known = {}
        while strengths := following(TRANSFORMS["smoothquant_plus"](name="smoothquant_plus"), known):
            known |= {s: losses[s]["loss"] for s in strengths}
        found = losses[min(known, key=known.get)]
        assert found["over_chosen"] <= found["over_chosen_se"]


def test_with_outliers_it_beats_plain_rounding(measured):
    row = next(row for row in measured if row["model"] == "outliers")
    difference, error = row["plus_minus"]["RTN"]["kl"]
    assert difference < -3 * error
