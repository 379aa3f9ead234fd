"""The table of activations measures what it names."""

import pytest

from quantkit.bench.quality.activations import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.name}")
def test_every_case_is_a_recipe_whose_scheme_is_told(case):
    """Shipped recipes exist, and those with 8-bit inputs say so."""
    assert ("inputs" in case.scheme) == ("a16" not in case.name.lower())
