"""Windows are seeded, disjoint and made of the text that was asked for; bad data is told by name."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from quantkit import assets
from quantkit.calibration import text as module
from quantkit.calibration.text import token_windows
from quantkit.errors import DataError
from quantkit.recipe import Calibration

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets.default_model())


@pytest.fixture
def chatty():
    tokenizer = AutoTokenizer.from_pretrained(assets.default_model())
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    return tokenizer


def words(count, start=0):
    return " ".join(f"number {i}" for i in range(start, start + count))


def calibration(*data, samples=4, length=LENGTH, seed=0):
    return Calibration(data=list(data), samples=samples, sequence_length=length, seed=seed)


def windows(tokenizer, *data, **keywords):
    return token_windows(calibration(*data, **keywords), tokenizer, assets.calibration_text())


def decoded(tokenizer, found):
    return [tokenizer.decode(row) for row in found.ids]


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# windows -----------------------------------------------------------


def test_the_default_text_gives_the_default_windows(tokenizer):
    found = token_windows(Calibration(), tokenizer, assets.calibration_text())
    assert found.ids.shape == (128, 512)
    assert found.ids.dtype == torch.int64
    assert found.notes == ["calibration.txt: 128 windows of 512 tokens, without overlap, from 148661 tokens"]


def test_same_seed_same_windows_other_seed_other_windows(tokenizer):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, two, other = (windows(tokenizer, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.ids, two.ids)
    assert one.digest == two.digest
    assert one.digest != other.digest
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("samples", [1, 7, 8])
def test_windows_are_disjoint_pieces_of_the_text(samples):
    """Tokens that count upwards show where each window lies."""
    tokens = torch.arange(8 * LENGTH + LENGTH // 2)
    generator = torch.Generator().manual_seed(0)
    found = module._cut(tokens, samples, LENGTH, None, generator, "x")
    assert found.shape == (samples, LENGTH)
    assert torch.equal(found, found[:, :1] + torch.arange(LENGTH))
    assert len(found.unique()) == found.numel()


def test_windows_cover_the_whole_text_and_come_in_random_order(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(words(4000))
    found = windows(tokenizer, str(tmp_path / "a.txt"), samples=32)
    first = [int(row.split("number")[1].split()[0]) for row in decoded(tokenizer, found)]
    assert first != sorted(first)
    assert min(first) < 800
    assert max(first) > 3200


def test_exactly_enough_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(words(300))
    tokens = tokenizer(words(300), add_special_tokens=False)["input_ids"]
    found = windows(tokenizer, str(tmp_path / "a.txt"), samples=1, length=len(tokens))
    assert found.ids[0].tolist() == tokens
    with pytest.raises(DataError, match=rf"need {len(tokens) + 1} tokens of text, there are {len(tokens)};"):
        windows(tokenizer, str(tmp_path / "a.txt"), samples=1, length=len(tokens) + 1)


def test_too_little_text_says_what_would_fit(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(words(100))
    count = len(tokenizer(words(100), add_special_tokens=False)["input_ids"])
    with pytest.raises(DataError) as caught:
        windows(tokenizer, str(tmp_path / "a.txt"), samples=64, length=32)
    for part in ("a.txt", "64 windows of 32 tokens", str(64 * 32), str(count), f"to {count // 32} at most"):
        assert part in str(caught.value)


def test_bos_begins_every_window_where_the_tokenizer_adds_it(tokenizer):
    class WithBos:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, add_special_tokens=True, **keywords):
            found = tokenizer(text, add_special_tokens=False, **keywords)
            if add_special_tokens:
                found["input_ids"] = [tokenizer.bos_token_id, *found["input_ids"]]
            return found

    found = windows(WithBos())
    assert found.ids.shape == (4, LENGTH)
    assert (found.ids[:, 0] == tokenizer.bos_token_id).all()
    assert (found.ids[:, 1:] != tokenizer.bos_token_id).all()
    assert (windows(tokenizer).ids != tokenizer.bos_token_id).all()


def test_pieces_join_to_the_whole_text(tokenizer, monkeypatch):
    text = words(2000).replace("number 7", "\nnumber\n7") + "x" * 500
    whole = module._tokens(text, tokenizer)
    monkeypatch.setattr(module, "PIECE", 100)
    assert tokenizer.decode(module._tokens(text, tokenizer)) == tokenizer.decode(whole) == text


def test_a_tokenizer_that_does_not_belong_to_the_model(tokenizer):
    with pytest.raises(DataError, match="the model has 10; they do not match"):
        token_windows(calibration(), tokenizer, assets.calibration_text(), vocabulary=10)
    token_windows(calibration(), tokenizer, assets.calibration_text(), vocabulary=len(tokenizer))


def test_a_text_of_unknown_tokens_is_noted(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(words(200))
    usual = int(windows(tokenizer, str(tmp_path / "a.txt")).ids.flatten().mode().values)
    strange = SimpleNamespace(unk_token_id=usual)
    reading = module._Reading(calibration("a.txt").data[0], 10)
    notes = module._notes(reading, torch.tensor([usual, 1, 2, 3]), 1, 4, strange)
    assert "25% of its tokens are unknown" in notes[-1]


# mixtures ----------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((None, None), (4, 3)), ((2, None), (2, 5)), ((None, 6), (1, 6)), ((3, 4), (3, 4))],
)
def test_a_mixture_gives_each_source_its_count(tokenizer, tmp_path, counts, expected):
    data = []
    for name, count in zip(("apple", "river"), counts, strict=True):
        (tmp_path / name).write_text(f"{name} " * 1000)
        data.append({"source": str(tmp_path / name)} | ({} if count is None else {"samples": count}))
    rows = decoded(tokenizer, windows(tokenizer, *data, samples=7))
    assert (sum("apple" in r for r in rows), sum("river" in r for r in rows)) == expected


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
    with pytest.raises(DataError, match=match if name == "a.txt" else "not UTF-8|not valid JSON"):
        windows(tokenizer, str(tmp_path / name))


def test_a_byte_order_mark_is_no_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(words(200), encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text(words(200))
    a, b = (windows(tokenizer, str(tmp_path / name)) for name in ("a.txt", "b.txt"))
    assert a.digest == b.digest


def test_a_huge_text_is_cut_and_noted(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEAST_READ", 10)
    (tmp_path / "a.txt").write_text(words(1000))
    found = windows(tokenizer, str(tmp_path / "a.txt"), samples=1)
    assert (
        found.notes[1]
        == f"a.txt: only its first {32 * LENGTH} characters were read, enough for these windows"
    )


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
        ("{", r"a\.jsonl:2: not valid JSON"),
        ("[" * 100_000, r"a\.jsonl:2: not valid JSON"),
        ("[1]", r"a\.jsonl:2: a list"),
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
    assert "only its first 2000000 characters" in found.notes[1]
    assert len(read) < 5000


def test_without_the_datasets_package(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        windows(tokenizer, "owner/name")


def test_datasets_is_imported_lazily():
    import os
    import subprocess
    import sys

    code = "import sys, quantkit.calibration.text; assert 'datasets' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
