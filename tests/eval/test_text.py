"""Text sources; the dataset library is met without a network."""

import json
import sys

import datasets
import pytest
from quantkit_eval import EvalError, load_text
from quantkit_eval.text import source_name

ROWS = ["", " = Title = \n", "", " First row .\n", "Last row"]


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` that answers with ROWS and records how it was asked."""
    asked = []

    def load(*args, **keywords):
        asked.append((args, keywords))
        return datasets.Dataset.from_dict({"text": ROWS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_file_is_its_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffGrüße\n".encode())
    assert load_text(path) == load_text(str(path)) == load_text([path]) == "Grüße\n"


def test_sources_are_joined_by_a_blank_line(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text(path.stem)
    assert load_text(paths) == "a\n\nb"


def test_rows_are_joined_the_usual_way_with_the_empty_ones(hub):
    assert load_text("hf:wikitext:wikitext-2-raw-v1:test") == "\n\n".join(ROWS)
    assert hub == [(("wikitext", "wikitext-2-raw-v1"), {"split": "test"})]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:a/b", (("a/b", None), {"split": "test"})),
        ("hf:a/b:c", (("a/b", "c"), {"split": "test"})),
        ("hf:a/b::validation", (("a/b", None), {"split": "validation"})),
    ],
)
def test_config_and_split_may_be_left_out(hub, source, asked):
    load_text(source)
    assert hub == [asked]


def test_a_saved_dataset_folder(tmp_path):
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(tmp_path / "one")
    splits = {"train": datasets.Dataset.from_dict({"text": ["no"]})}
    splits["test"] = datasets.Dataset.from_dict({"text": ROWS})
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "split")
    assert load_text(tmp_path / "one") == load_text(tmp_path / "split") == "\n\n".join(ROWS)


def test_a_folder_of_data_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    assert load_text(folder) == "\n\n".join(ROWS)


def test_files_that_hold_no_text_are_told_by_name(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"text\0text")
    reasons = {"gone": "no file", "empty": "is empty", "latin": "not UTF-8", "binary": "NUL characters"}
    for name, told in ((f"{stem}.txt", words) for stem, words in reasons.items()):
        with pytest.raises(EvalError, match=told) as raised:
            load_text(tmp_path / name)
        assert name in str(raised.value)


def test_no_source_is_told():
    with pytest.raises(EvalError, match="no evaluation text was given"):
        load_text([])


@pytest.mark.parametrize("source", ["hf:", "hf:a:b:c:d"])
def test_a_misspelt_dataset_is_told(source):
    with pytest.raises(EvalError, match=r"hf:name\[:config\[:split\]\]"):
        load_text(source)


@pytest.mark.parametrize(
    ("columns", "told"),
    [({"body": ["a"]}, "no field 'text' but body"), ({"text": [1, 2]}, "other than text")],
)
def test_a_dataset_without_text_is_told(monkeypatch, columns, told):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_dict(columns))
    with pytest.raises(EvalError, match=told):
        load_text("hf:a")


def test_a_dataset_that_cannot_be_reached_is_told(monkeypatch):
    def unreachable(*args, **keywords):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(EvalError, match="dataset hf:a/b cannot be read: ConnectionError: no route to host"):
        load_text("hf:a/b")


def test_a_missing_library_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EvalError, match="needs the package `datasets`"):
        load_text("hf:a/b")


def test_reports_name_files_without_their_folders(tmp_path):
    assert source_name(tmp_path / "a.txt") == "a.txt"
    assert source_name(str(tmp_path)) == tmp_path.name
    assert source_name("hf:a/b:c") == "hf:a/b:c"
