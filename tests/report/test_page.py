"""The page: every kind of result is on it, nothing of a user's text becomes markup, nothing is fetched."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_results as made

from quantkit.cli.main import run
from quantkit.errors import UserError
from quantkit.report.page import page, write_page
from quantkit.report.parts import number, plus_minus, seconds, size
from quantkit.report.quality import KL, SIZE, front
from quantkit.report.read import READERS, read_results
from quantkit.report.results import Point
from quantkit.report.style import Studio


class Tags(HTMLParser):
    """Tags with their attributes, and the text outside styles and scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._stack = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("style", "script"):
            self._stack.append(tag)

    def handle_endtag(self, tag):
        if tag in ("style", "script"):
            self._stack.pop()

    def handle_data(self, data):
        if not self._stack:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def hostile(everything):
    return page(read_results(everything(made.HOSTILE)), Studio(), made.HOSTILE)


def test_what_engines_refuse_is_folded_where_many_recipes_repeat_it(tmp_path):
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(made.sweep()))
    found = Tags(page(read_results([file]), Studio(), "t"))
    opened = [attributes for tag, attributes in found.tags if tag == "details"]
    assert "What engines refuse, and what they run instead (1)" in found.text
    assert "refused by an engine: no kernel (w2-rtn, w4-rtn and 3 more)" in found.text
    assert all("open" not in each for each in opened if each.get("class") == "listing")


def test_every_kind_of_result_has_its_section(whole):
    found = Tags(whole)
    sections = [attributes["id"] for tag, attributes in found.tags if tag == "section"]
    assert sections == ["quality", "speed", "explanation", "layers", "cost", "warnings", "reproduce"]
    links = [a["href"] for tag, a in found.tags if tag == "a" and "href" in a]
    assert links == [f"#{name}" for name in sections]
    for said in (
        "w8-gptq", "0.01000 ± 0.00050", "Is A closer to the original than B?", "Holm", "e-09",  # sweep
        "separate runs: about 1 min 30 s", "w2-bad: failed, collapsed",
        "60.0 ± 0.50", "75.0%", "18 ms",  # bench
        "GPU", "softmax",  # plan
        "Call me", "Ish", "is restored", "its window was not run again",  # explanation
        "tokens that came to each expert", "experts.up_proj (2)", "300.00 MB",  # checkpoint
        "sha256 of text", "4" * 64, "bits: 4",  # reproduction
    ):  # fmt: skip
        assert said in found.text, said


def test_text_of_users_and_models_stays_text(hostile, whole):
    found, plain = Tags(hostile), Tags(whole)
    tags = [tag for tag, _ in found.tags]
    assert set(tags) == {tag for tag, _ in plain.tags}
    assert (tags.count("script"), tags.count("title")) == (1, [tag for tag, _ in plain.tags].count("title"))
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert "<script>alert" not in hostile
    assert "<img" not in hostile
    assert "alert(1)" in found.text  # shown as it is
    assert "$x$" in found.text  # no mathematics of matplotlib's


def test_nothing_is_fetched(whole):
    found = Tags(whole)
    fetched = {"src", "srcset", "poster", "data", "action", "background"}
    assert [a for _, a in found.tags if fetched & a.keys()] == []
    links = [v for _, a in found.tags for n, v in a.items() if n in ("href", "xlink:href")]
    assert links
    assert all(link.startswith(("#", "data:image/png")) for link in links)
    assert not re.search(r"@import|url\((?!#)", whole)
    assert any("default-src 'none'" in (a.get("content") or "") for tag, a in found.tags if tag == "meta")


def test_plots_take_the_colours_of_the_page(whole):
    drawn = "".join(re.findall(r"<svg.*?</svg>", whole, re.DOTALL))
    assert "var(--ink)" in drawn
    assert "var(--c1)" in drawn
    assert not re.search(r"#0b0c", drawn)
    assert re.findall(r"#[0-9a-f]{6}\b", drawn) == []
    ids = re.findall(r'\bid="([^"]+)"', whole)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', whole)
    assert set(used) <= set(ids)


def test_the_same_results_give_the_same_plots(tmp_path):
    results = read_results([made.write(tmp_path / "bench.json", made.bench())])
    first, again = (re.findall(r"<svg.*?</svg>", page(results, Studio()), re.DOTALL) for _ in range(2))
    assert first
    assert first == again


def test_the_front_is_what_nothing_smaller_beats():
    def point(name, n_bytes, kl):
        return Point(name, "g", 4.0, n_bytes, None, made.evaluation(kl))

    points = [
        point("a", 1, 0.5),
        point("b", 2, 0.6),
        point("c", 2, 0.1),
        point("d", 3, 0.1),
        point("e", 4, 0.05),
    ]
    assert [p.name for p in front(points, SIZE, KL)] == ["a", "c", "e"]
    assert front([], SIZE, KL) == []


def test_numbers_of_the_page_are_the_numbers_of_the_files(tmp_path):
    file = made.write(tmp_path / "sweep.json", made.sweep())
    found = Tags(page(read_results([file]), Studio()))
    sorted_by = [
        float(a["data-sort"])
        for tag, a in found.tags
        if tag == "td" and a.get("class") == "num" and "data-sort" in a
    ]
    for each in made.sweep()["cells"][:-1]:
        report = each["evaluation"]
        for value in (
            report["kl_mean"],
            report["kl_p99"],
            report["quantized"]["perplexity"],
            report["top1_agreement"],
        ):
            assert value in sorted_by


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.0027432), "0.00274"), (number(1234567.0), "1,234,567"), (number(8), "8"), (number(None), "–"),
        (number(-8.97e-6), "-8.97e-06"), (plus_minus(0.0027432, 0.0000659), "0.002743 ± 0.000066"),
        (plus_minus(54.95556, 1.9519), "55.0 ± 2.0"), (plus_minus(8.97e-6, 2.7e-7), "(8.97 ± 0.27)e-6"),
        (plus_minus(3.0, None), "3.000"), (size(16793976), "16.79 MB"),
        (seconds(99.2), "1 min 39 s"), (seconds(3725), "1 h 2 min"),
        (seconds(0.0042), "4.2 ms"), (seconds(2e-6), "2 µs"), (seconds(0.0), "0 s"),
    ],
)  # fmt: skip
def test_numbers_are_readable(shown, expected):
    assert shown == expected


@pytest.mark.parametrize("kind", ["bench", "plan", "eval"])
def test_each_result_alone_makes_a_page(everything, kind, tmp_path):
    given = dict(zip(("sweep", "bench", "plan", "eval", "folder"), everything(), strict=True))
    (written,) = write_page([given[kind]], tmp_path / "p.html")
    assert "<section" in written.read_text()


def test_an_evaluation_of_a_checkpoint_takes_the_place_of_its_closing_one(everything, tmp_path):
    folder = everything()[-1]
    value = made.explained(model=str(folder)) | {"kl_mean": 0.0625}
    results = read_results([folder, made.write(tmp_path / "e.json", value)])
    assert [p.evaluation.kl_mean for p in results.points] == [0.0625]
    other = made.write(tmp_path / "f.json", value | {"model": "another"})
    assert [p.evaluation.kl_mean for p in read_results([folder, other]).points] == [0.01]


def test_the_verb_writes_the_page_and_the_plots(everything, tmp_path, capsys):
    given = [str(each) for each in everything()]
    assert (
        run(
            [
                "report",
                *given,
                "-o",
                str(tmp_path / "r.html"),
                "--png",
                str(tmp_path / "png"),
                "--title",
                "T 1",
            ]
        )
        == 0
    )
    text = (tmp_path / "r.html").read_text()
    assert "<h1>T 1</h1>" in text
    pngs = sorted((tmp_path / "png").iterdir())
    assert len(pngs) == text.count("<figure")
    assert all(each.read_bytes().startswith(b"\x89PNG") for each in pngs)
    assert f"{len(pngs)} plots" in capsys.readouterr().out


def wrong(tmp_path):
    return {
        "missing": tmp_path / "missing.json",
        "schema": made.write(tmp_path / "schema.json", {"schema": "other/1"}),
        "entry": made.write(tmp_path / "entry.json", made.sweep() | {"cells": [{"id": 3}]}),
        "folder": tmp_path,
        "json": made.write(tmp_path / "json.json", [1]),
        "moved": made.write(
            tmp_path / "moved.json", {"schema": "quantkit-run/1", "output": str(tmp_path / "no")}
        ),
    }


@pytest.mark.parametrize("which", ["missing", "schema", "entry", "folder", "json", "moved"])
def test_what_is_no_result_is_refused_by_name(tmp_path, which, capsys):
    file = wrong(tmp_path)[which]
    with pytest.raises(UserError, match=re.escape(str(file))):
        read_results([file])
    assert run(["report", str(file), "-o", str(tmp_path / "r.html")]) == 2
    assert str(file) in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_a_damaged_checkpoint_is_refused(everything, tmp_path):
    folder = everything()[-1]
    text = (folder / "quantkit.json").read_text()
    (folder / "quantkit.json").write_text(
        text.replace("21.125", "11.125").replace('"kl_mean": 0.01', '"kl_mean": 0.001')
    )
    with pytest.raises(UserError, match="checksum"):
        read_results([folder])


def test_reading_imports_neither_torch_nor_matplotlib(everything):
    code = (
        "import sys; from quantkit.report.read import read_results; import quantkit.report.page; "
        f"read_results({[str(e) for e in everything()]!r}); "
        "print([m for m in ('torch', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_the_docs_name_every_schema():
    text = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text()
    assert all(f"`{schema}`" in text for schema in READERS)


def test_sweeps_of_other_models_are_refused_and_those_of_one_are_told_apart(tmp_path):
    for name in ("a", "b", "other"):
        told = made.sweep(name) | {"model_digest": "1" if name == "other" else "0"}
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    points = read_results([tmp_path / "a.json", tmp_path / "b.json"]).points
    assert len({point.name for point in points}) == len(points)
    with pytest.raises(UserError, match="a sweep of another model"):
        read_results([tmp_path / "a.json", tmp_path / "other.json"])
