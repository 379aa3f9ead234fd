"""The table of activations measures what it names."""

import json
from pathlib import Path

import pytest

from quantkit.bench.quality.activations import CASES

MEASURED = Path(__file__).resolve().parents[3] / "docs" / "benchmarks" / "activations.json"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.name}")
def test_every_case_is_a_recipe_whose_scheme_is_told(case):
    """Shipped recipes exist; those with 8-bit inputs and those with a quantized cache say so."""
    name = case.name.lower()
    assert ("inputs" in case.scheme) == ("a16" not in name and not name.startswith("kv-"))
    assert ("KV" in case.scheme) == ("kv-" in name)


def test_every_case_was_measured():
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    assert {(row["model"], row["name"]) for row in rows} == {(case.model, case.name) for case in CASES}
