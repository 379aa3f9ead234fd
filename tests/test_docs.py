"""What the documents point to: every relative link leads somewhere, every quoted command can be typed."""

import re
from pathlib import Path

import pytest
from quoted import FENCED, INLINE, commands, complaint

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
HISTORY = {"LOG.md", "CHANGELOG.md"}  # name commands as they were
LINK = re.compile(r"\]\(\s*([^)\s]+)\s*\)")


def anchors(page: Path) -> set[str]:
    """The names that headings get on a rendered page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of it."""
    text = INLINE.sub("", FENCED.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (heading and heading not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in HISTORY], ids=lambda page: page.name)
def test_every_quoted_command_can_be_typed(page, monkeypatch):
    typed = commands(page.read_text(encoding="utf-8"))
    complaints = [complaint(module, arguments, monkeypatch) for module, arguments in typed]
    assert [c for c in complaints if c] == []


def test_a_broken_link_and_a_wrong_command_are_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# A b\n[x](#a-b) [y](#c) [z](gone.md) [w](https://x.org)\n`quantkit inspect\nX --depth 3`\n"
    )
    assert broken_links(page) == ["#c", "gone.md"]
    assert commands(page.read_text()) == [(None, ["inspect", "X", "--depth", "3"])]
    assert "--depth" in complaint(None, ["inspect", "X", "--depth", "3"], monkeypatch)
    assert complaint(None, ["measure"], monkeypatch) == "no verb measure"
    assert complaint("quantkit.bench.roofline", ["--cores", "2"], monkeypatch)
