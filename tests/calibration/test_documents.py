"""Every kind of source gives its text within bounds; bad data is reported with file and line."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest
from calibration_data import LENGTH, calibration, decoded, jsonl, windows, words

from quantkit.calibration import documents as module
from quantkit.calibration import text as windows_module
from quantkit.calibration.documents import read_source
from quantkit.errors import DataError

# text files --------------------------------------------------------


@pytest.mark.parametrize("content", ["", "  \n\n "])
def test_empty_text(tokenizer, tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match=r"a\.txt is empty"):
        windows(tokenizer, str(tmp_path / "a.txt"))


@pytest.mark.parametrize(("content", "match"), [(b"caf\xe9 " * 99, "not UTF-8"), (b"a\0b" * 99, "NUL")])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_not_text(tokenizer, tmp_path, content, match, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match if name == "a.txt" else "not valid JSON"):
        windows(tokenizer, str(tmp_path / name))


def test_a_byte_order_mark_is_no_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(words(200), encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text(words(200))
    a, b = (windows(tokenizer, str(tmp_path / name)) for name in ("a.txt", "b.txt"))
    assert a.digest == b.digest


def test_a_huge_text_is_cut_and_noted(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(windows_module, "LEAST_READ", 10)
    (tmp_path / "a.txt").write_text(words(1000))
    found = windows(tokenizer, str(tmp_path / "a.txt"), samples=1)
    assert len(found.notes) == 1
    assert found.notes[0].endswith(f"tokens of its first {32 * LENGTH} characters")


@pytest.mark.parametrize("name", ["gone.txt", "./gone", "/gone/too", "data/x.jsonl", "no such"])
def test_missing_file(tokenizer, name):
    with pytest.raises(DataError, match="is no file, no folder and no dataset id"):
        windows(tokenizer, name)


# JSON lines and chats ----------------------------------------------


def test_jsonl_documents_are_joined(tokenizer, tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl", *({"text": words(40, 40 * i)} for i in range(20)), {"text": " "}, {"text": None}
    )
    found = windows(tokenizer, path, samples=8)
    assert all("number" in row for row in decoded(tokenizer, found))
    assert found.notes[1] == "a.jsonl: 2 of 22 documents are empty and left out"


def test_jsonl_field_is_chosen(tokenizer, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "wrong " * 200, "body": "right " * 200})
    rows = decoded(tokenizer, windows(tokenizer, {"source": path, "field": "body"}))
    assert all("right" in row and "wrong" not in row for row in rows)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", r"a\.jsonl:2 is not valid JSON"),
        ("[" * 100_000, r"a\.jsonl:2 is not valid JSON"),
        ("[1]", r"a\.jsonl:2 must hold an object, got a list"),
        ('{"body": "x"}', r"a\.jsonl:2: no field text or messages or conversations; it has body"),
        ('{"text": 3}', r"a\.jsonl:2: field text is neither"),
        ('{"messages": [{"from": "a"}]}', r"a\.jsonl:2: field messages is neither"),
    ],
)
def test_bad_jsonl_names_the_line(tokenizer, tmp_path, line, match):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=match):
        windows(tokenizer, str(tmp_path / "a.jsonl"))


def test_a_missing_named_field(tokenizer, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(DataError, match="no field body; it has text"):
        windows(tokenizer, {"source": path, "field": "body"})


CHAT = {"messages": [{"role": "user", "content": words(99)}, {"role": "assistant", "content": words(99)}]}


def test_chats_go_through_the_template(chatty, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", CHAT)
    rows = decoded(chatty, windows(chatty, path, samples=1, length=400))
    assert "<assistant> number 0" in rows[0]


def test_chats_without_a_template(tokenizer, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", CHAT)
    with pytest.raises(DataError, match=r"a\.jsonl:1: chat messages need a chat template"):
        windows(tokenizer, path)


def test_a_template_that_refuses(chatty, tmp_path):
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = jsonl(tmp_path / "a.jsonl", CHAT)
    with pytest.raises(DataError, match="the chat template refuses these messages: roles must alternate"):
        windows(chatty, path)


# datasets ----------------------------------------------------------


@pytest.fixture
def hub_offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def parquet(path, **columns):
    import pyarrow
    from pyarrow import parquet as writer

    path.parent.mkdir(exist_ok=True)
    writer.write_table(pyarrow.table(columns), path)


def test_a_local_folder_of_parquet(tokenizer, tmp_path, hub_offline):
    texts = [words(40, 40 * i) for i in range(20)]
    parquet(tmp_path / "set" / "train.parquet", text=texts, label=list(range(20)))
    parquet(tmp_path / "set" / "test.parquet", text=["other " * 400], label=[0])
    rows = decoded(tokenizer, windows(tokenizer, str(tmp_path / "set")))
    assert all("number" in row for row in rows)
    rows = decoded(tokenizer, windows(tokenizer, {"source": str(tmp_path / "set"), "split": "test"}))
    assert all("other" in row for row in rows)


def test_a_saved_dataset(tokenizer, tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": [words(400)]}).save_to_disk(tmp_path / "saved")
    assert all("number" in row for row in decoded(tokenizer, windows(tokenizer, str(tmp_path / "saved"))))


def test_chats_of_a_dataset(chatty, tmp_path, hub_offline):
    jsonl_folder = tmp_path / "set"
    jsonl_folder.mkdir()
    jsonl(jsonl_folder / "train.jsonl", CHAT, CHAT)
    assert windows(chatty, str(jsonl_folder)).ids.shape == (4, LENGTH)


def test_a_split_that_is_not_there(tokenizer, tmp_path, hub_offline):
    parquet(tmp_path / "set" / "train.parquet", text=["a"])
    with pytest.raises(DataError, match=r"split nowhere\) cannot be read"):
        windows(tokenizer, {"source": str(tmp_path / "set"), "split": "nowhere"})


def test_an_empty_folder(tokenizer, tmp_path, hub_offline):
    with pytest.raises(DataError, match="cannot be read"):
        windows(tokenizer, str(tmp_path))


def test_a_hub_dataset_that_cannot_be_reached(tokenizer, monkeypatch):
    import datasets

    def unreachable(path, name, split, streaming):
        assert (path, name, split, streaming) == ("owner/name", "small", "train", True)
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"dataset owner/name \(split train\) cannot be read: ConnectionError: no route"
    ):
        windows(tokenizer, {"source": "owner/name", "config": "small"})


def test_a_dataset_is_read_no_further_than_needed(tokenizer, monkeypatch):
    import datasets

    read = []

    def endless(*args, **keywords):
        while True:
            read.append(1)
            yield {"text": words(100)}

    monkeypatch.setattr(datasets, "load_dataset", endless)
    found = windows(tokenizer, "owner/endless")
    assert found.notes[0].endswith("of its first 2,000,000 characters")
    assert len(read) < 5000


def test_without_the_datasets_package(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        windows(tokenizer, "owner/name")


def test_datasets_is_imported_lazily():
    code = "import sys, quantkit.calibration.text; assert 'datasets' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# the kind of a file is told by its name ----------------------------

TEXTS = [words(40, 40 * i) for i in range(20)]


def table(path, delimiter=",", column="text"):
    quoted = [f'"{text}"' for text in TEXTS]
    path.write_text(
        "\n".join([f"id{delimiter}{column}", *(f"{i}{delimiter}{t}" for i, t in enumerate(quoted))])
    )


def test_every_format_of_the_same_records_gives_the_same_windows(tokenizer, tmp_path):
    jsonl(tmp_path / "a.jsonl", *({"text": text} for text in TEXTS))
    for name in ("a.ndjson", "a.NDJSON"):
        (tmp_path / name).write_bytes((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.json").read_bytes())
    table(tmp_path / "a.csv")
    table(tmp_path / "a.tsv", "\t")
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    parquet(tmp_path / "a.parquet", text=TEXTS, other=list(range(20)))
    found = {path.name: windows(tokenizer, str(path)).digest for path in sorted(tmp_path.iterdir())}
    assert len(found) == 10
    assert len(set(found.values())) == 1, found


def test_a_column_of_a_table_is_chosen(tokenizer, tmp_path):
    table(tmp_path / "a.csv", column="body")
    with pytest.raises(DataError, match=r"a\.csv:2: no field text .* it has id, body; name the one"):
        windows(tokenizer, str(tmp_path / "a.csv"))
    assert windows(tokenizer, {"source": str(tmp_path / "a.csv"), "field": "body"}).ids.shape == (4, LENGTH)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.zip", "archive"),
        ("a.txt.bz2", "archive"),
        ("a.pdf", "plain text"),
        ("a.arrow", "save_to_disk"),
        ("a.xlsx", ".csv"),
        ("a.safetensors", "not text"),
    ],
)
def test_a_format_without_text_is_refused_by_name(tokenizer, tmp_path, name, said):
    (tmp_path / name).write_text(words(400))
    with pytest.raises(DataError, match=name) as caught:
        windows(tokenizer, str(tmp_path / name))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.csv.gz", "a.txt.gz"])
def test_a_file_that_is_not_what_its_name_says(tokenizer, tmp_path, name):
    (tmp_path / name).write_text(words(400))
    with pytest.raises(DataError, match=rf"{name}.* cannot be read"):
        windows(tokenizer, str(tmp_path / name))


def test_a_gzip_file_that_is_cut(tokenizer, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": words(999)}).encode())[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        windows(tokenizer, str(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("a.txt", {"field": "text"}),
        ("a.txt", {"split": "train"}),
        ("a.txt", {"config": "en", "split": "train", "field": "text"}),
        ("a", {"field": "text"}),
        ("a.jsonl", {"split": "train"}),
        ("a.csv", {"config": "en"}),
        ("a.parquet", {"split": "train"}),
    ],
)
def test_a_key_that_the_source_cannot_have_is_refused(tokenizer, tmp_path, name, keys):
    jsonl(tmp_path / name, {"text": words(400)})
    with pytest.raises(DataError, match="has no") as caught:
        windows(tokenizer, {"source": str(tmp_path / name)} | keys)
    for key in keys:
        assert key in str(caught.value)


def test_a_saved_dataset_has_no_config(tokenizer, tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": [words(400)]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="has no config"):
        windows(tokenizer, {"source": str(tmp_path / "saved"), "config": "en"})


# ShareGPT ----------------------------------------------------------

SHARED = {
    "conversations": [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": words(99)},
        {"from": "gpt", "value": words(99)},
    ]
}


def test_sharegpt_chats_are_chats(chatty, tmp_path):
    other = {
        "messages": [
            {"role": role, "content": m["value"]}
            for role, m in zip(("system", "user", "assistant"), SHARED["conversations"], strict=True)
        ]
    }
    paths = [jsonl(tmp_path / "a.jsonl", SHARED), jsonl(tmp_path / "b.jsonl", other)]
    one, two = (windows(chatty, path, samples=1, length=400) for path in paths)
    assert one.digest == two.digest
    assert "<assistant> number 0" in decoded(chatty, one)[0]


def test_a_sharegpt_role_nobody_knows(chatty, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"conversations": [{"from": "narrator", "value": "x"}]})
    with pytest.raises(DataError, match=r"a\.jsonl:1: a message from 'narrator'; known: human"):
        windows(chatty, path)


# bounds ------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_line_without_end_is_not_read(tokenizer, tmp_path, monkeypatch, hub_offline, name, folder):
    monkeypatch.setattr(module, "MAX_LINE", 10_000)
    (tmp_path / "set").mkdir()
    lines = 'text\n"' + "x" * 100_000 + '"\n' if "csv" in name else json.dumps({"text": "x" * 100_000}) + "\n"
    raw = lines.encode()
    path = tmp_path / "set" / name
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(DataError, match=rf"{name}:[12]: more than 10,000 bytes in one line"):
        windows(tokenizer, str(path.parent if folder else path))


def test_a_list_without_end_is_not_read(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_LIST", 10_000)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 1000}] * 100))
    with pytest.raises(DataError, match="write it as JSON Lines"):
        windows(tokenizer, str(tmp_path / "a.json"))


def test_a_large_bound_takes_no_memory_of_its_own(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("short")
    found = read_source(calibration(str(tmp_path / "a.txt")).data[0], 10**15, tokenizer)
    assert (found.text, found.cut, found.name) == ("short", False, "a.txt")


def test_a_text_in_several_pieces(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 7)
    (tmp_path / "a.txt").write_text("äöü𝄞" * 50, encoding="utf-8")
    assert read_source(calibration(str(tmp_path / "a.txt")).data[0], 10**6, tokenizer).text == "äöü𝄞" * 50


def test_a_character_at_the_bound_is_not_cut(tokenizer, tmp_path, monkeypatch):
    for ending in ("é", "𝄞", "a"):
        (tmp_path / "a.txt").write_text(ending * 1000, encoding="utf-8")
        for limit in (99, 100, 101):
            found = read_source(calibration(str(tmp_path / "a.txt")).data[0], limit, tokenizer)
            assert found.text == ending * limit
            assert found.cut


# text that is no text ----------------------------------------------


@pytest.mark.parametrize("bad", ["\\ud83d", "\\udc00 x", "\\u0000"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_is_reported_with_its_line(tokenizer, tmp_path, bad, name):
    line = '{"text": "' + bad + " hello" * 99 + '"}'
    (tmp_path / name).write_text('[{"text": "fine"}, ' + line + "]" if name == "a.json" else line)
    with pytest.raises(DataError, match=rf"{name}(:1|\[1\]|).*(half of a|NUL)"):
        windows(tokenizer, str(tmp_path / name))


def test_half_a_character_of_a_dataset(tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: iter([{"text": "x \ud83d"}]))
    with pytest.raises(DataError, match=r"owner/name\[0\]: field text holds .* half of a surrogate pair"):
        windows(tokenizer, "owner/name")


@pytest.mark.parametrize("path", ["~nosuchuser/a.txt", "a\0b", "x" * 5000])
def test_a_path_that_cannot_be(tokenizer, path):
    source = calibration("a").data[0].model_copy(update={"source": path})
    with pytest.raises(DataError):
        read_source(source, 100, tokenizer)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.jsonl.gz", "a.tsv"])
def test_damaged_data_is_text_or_an_error_of_ours(chatty, tmp_path, name):
    """Seeded: each kind of file with bytes flipped, cut, doubled, or none of its own."""
    path = tmp_path / name
    lines = [SHARED, {"text": words(30)}, {"text": "ä \u2028 𝄞" * 30}, {"messages": None, "text": "x"}]
    if name == "a.parquet":
        parquet(path, text=TEXTS)
    elif name in ("a.csv", "a.tsv"):
        table(path, "," if name == "a.csv" else "\t")
    elif name == "a.jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    else:
        jsonl(path, *lines)
    good = path.read_bytes()
    draw = random.Random(f"documents {name}")
    for _ in range(60):
        raw = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(raw))
            kind = draw.randrange(4)
            if kind == 0:
                raw[at] = draw.randrange(256)
            elif kind == 1:
                del raw[at : at + draw.randint(1, 40)]
            elif kind == 2:
                raw[at:at] = draw.choice(
                    [b"\0", b"\xff", b'"', b"[" * 99, b"NaN", b"9" * 5000, b"\\ud800", b"\n"]
                )
            else:
                raw[at:at] = raw[: draw.randint(1, 200)]
            raw = raw or bytearray(b"x")
        path.write_bytes(raw)
        said, text = None, ""
        try:
            text = read_source(calibration(str(path)).data[0], 5000, chatty).text
        except DataError as error:
            said = str(error)
        assert said is None or name in said
        text.encode()
        assert "\0" not in text
