"""The page of results is what its benchmark writes."""

import json
from pathlib import Path

from quantkit.bench.quality.methods import markdown

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_results_page_is_made_from_the_committed_measurement():
    measured = json.loads((DOCS / "benchmarks" / "methods.json").read_text(encoding="utf-8"))
    page = markdown(measured["rows"], measured["machine"])
    assert page == (DOCS / "results.md").read_text(encoding="utf-8")
