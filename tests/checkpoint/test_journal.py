"""The journal: what it keeps, what it refuses, what it deletes, and what a flipped bit does to it."""

import random
from dataclasses import replace

import pytest
from manifests import EMPTY

from quantkit.checkpoint.journal import Journal, read_lines
from quantkit.checkpoint.manifest import MANIFEST, RUN, write_manifest, write_sealed
from quantkit.checkpoint.records import FileRecord
from quantkit.errors import NumericalError, OutputError

IDENTITY = {"recipe": {"bits": 4}, "model": "abc"}
WRITES = ["model-1.safetensors", "model-2.safetensors", "config.json", "templates/a.jinja", MANIFEST]
FOREIGN = (
    "notes.json",
    "tokenizer-mine.txt",
    "LICENSE-mine",
    "my.model",
    "vocab-mine.txt",
    "model-9.safetensors",
)


def entry(part, **more):
    return {"part": part, "written": {"file": f"model-{part}.safetensors"}, **more}


OPEN = []


def opened(folder, resume=True, identity=IDENTITY, writes=WRITES):
    OPEN.append(Journal(folder, identity, resume, writes))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPEN:
        OPEN.pop().close()


def finished(folder, *names):
    """A finished checkpoint with these files."""
    files = {name: FileRecord("0" * 64, 4) for name in names}
    for name in names:
        (folder / name).write_text("ours")
    write_manifest(folder, replace(EMPTY, identity=IDENTITY, files=files))


def put(folder, names=FOREIGN):
    for name in names:
        (folder / name).write_text("precious")


def left(folder, names=FOREIGN):
    return [name for name in names if (folder / name).exists()]


def test_entries_come_back(tmp_path):
    journal = opened(tmp_path / "o")
    journal.append(entry(1))
    journal.append(entry(2))
    journal.close()
    again = opened(tmp_path / "o")
    assert again.entries == [entry(1), entry(2)]
    assert again.cut is None
    again.forget_after(1)
    again.close()
    assert opened(tmp_path / "o").entries == [entry(1)]


def test_a_torn_last_line_is_dropped_silently(tmp_path):
    with_lines(tmp_path / "o", 2)
    file = tmp_path / "o/.quantkit/journal.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    journal = opened(tmp_path / "o")
    assert (len(journal.entries), journal.cut) == (1, None)


def with_lines(folder, count):
    """A journal of so many entries; returns them."""
    journal = opened(folder)
    for part in range(1, count + 1):
        journal.append(entry(part, layers=[{"name": "a.b", "error": 0.5 / part}]))
    journal.close()
    return list(journal.entries)


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_bit_never_changes_what_is_read(tmp_path, seed):
    folder = tmp_path / "o"
    true = with_lines(folder, 4)
    file = folder / ".quantkit/journal.jsonl"
    raw = bytearray(file.read_bytes())
    choose = random.Random(seed)
    at = choose.randrange(len(raw))
    raw[at] ^= 1 << choose.randrange(8)
    number = bytes(raw[:at]).count(b"\n")
    file.write_bytes(raw)
    if number == 0:
        with pytest.raises(OutputError, match="--no-resume"):
            opened(folder)
        return
    journal = opened(folder)
    assert journal.entries == true[: number - 1]
    last = number == len(true) and at == len(raw) - 1  # a line without its end looks like the trace of a kill
    assert last or f"line {number + 1} of" in journal.cut


def test_lines_cannot_change_places(tmp_path):
    with_lines(tmp_path / "o", 3)
    file = tmp_path / "o/.quantkit/journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], lines[2], lines[1], lines[3]]))
    kept, damage = read_lines(file)
    assert len(kept) == 1
    assert "line 2" in damage


def test_another_run_is_refused(tmp_path):
    opened(tmp_path / "o").close()
    with pytest.raises(OutputError, match=r"recipe.bits: 4 -> 8(.|\n)*--no-resume"):
        opened(tmp_path / "o", identity={"recipe": {"bits": 8}, "model": "abc"})
    opened(tmp_path / "o", resume=False, identity={"recipe": {"bits": 8}, "model": "abc"})


def test_starting_over_deletes_what_the_journal_names_and_nothing_else(tmp_path):
    folder = tmp_path / "o"
    journal = opened(folder)
    put(folder)
    put(folder, ["model-1.safetensors", "config.json", "config.json.tmp"])
    (folder / "templates").mkdir()
    put(folder, ["templates/a.jinja"])
    journal.append(entry(1))
    journal.close()
    opened(folder, resume=False).close()
    assert left(folder) == list(FOREIGN)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FOREIGN, ".quantkit"])


def test_starting_over_deletes_what_the_manifest_names_and_nothing_else(tmp_path):
    finished(tmp_path, "model-1.safetensors", "config.json")
    put(tmp_path)
    opened(tmp_path, resume=False).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FOREIGN, ".quantkit"])


def test_beside_a_damaged_manifest_the_record_of_the_run_says_what_is_ours(tmp_path):
    finished(tmp_path, "model-1.safetensors", "config.json")
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(OutputError, match=r"did not write.*config.json, model-1.safetensors"):
        opened(tmp_path, resume=False)
    write_sealed(tmp_path / RUN, {"files": {"model-1.safetensors": "", "config.json": ""}})
    put(tmp_path)
    opened(tmp_path, resume=False).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FOREIGN, ".quantkit"])


@pytest.mark.parametrize("resume", [True, False])
def test_an_empty_journal_folder_makes_nothing_ours(tmp_path, resume):
    (tmp_path / ".quantkit").mkdir()
    put(tmp_path)
    opened(tmp_path, resume).close()
    assert left(tmp_path) == list(FOREIGN)


@pytest.mark.parametrize("resume", [True, False])
def test_foreign_files_in_the_way_are_refused_by_name(tmp_path, resume):
    (tmp_path / ".quantkit").mkdir()
    put(tmp_path, ["config.json"])
    with pytest.raises(OutputError, match=r"did not write.*config.json"):
        opened(tmp_path, resume)
    assert (tmp_path / "config.json").read_text() == "precious"


def test_a_folder_of_something_else_is_refused(tmp_path):
    put(tmp_path)
    with pytest.raises(OutputError, match="not the output of a quantkit run"):
        opened(tmp_path)
    assert left(tmp_path) == list(FOREIGN)


def test_names_that_leave_the_folder_are_never_deleted(tmp_path):
    folder = tmp_path / "o"
    opened(folder, writes=["../precious", str(tmp_path / "precious"), "link/a.jinja"]).close()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jinja").write_text("precious")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    opened(folder, resume=False, writes=[]).close()
    assert (tmp_path / "precious").exists()
    assert (tmp_path / "elsewhere/a.jinja").exists()


def test_a_number_that_is_none_is_told_before_it_is_journalled(tmp_path):
    journal = opened(tmp_path / "o")
    with pytest.raises(NumericalError, match=r"a\.b: error became nan"):
        journal.append(entry(1, layers=[{"name": "a.b", "error": float("nan")}]))
    assert journal.entries == []
