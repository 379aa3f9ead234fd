"""The page of results is what its benchmarks have measured."""

from pathlib import Path

from quantkit.bench.quality.results import page

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_results_page_is_made_from_the_committed_measurements():
    assert page(DOCS) == (DOCS / "results.md").read_text(encoding="utf-8")
