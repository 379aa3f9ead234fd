"""The plot and the tables of SmoothQuant+ say what was measured."""

from xml.etree import ElementTree

from quantkit.bench.quality.strength import markdown
from quantkit.bench.quality.strength_plot import plot

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
