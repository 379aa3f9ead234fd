"""Windows are seeded, disjoint and made of the text that was asked for."""

from types import SimpleNamespace

import pytest
import torch
from calibration_data import LENGTH, calibration, decoded, windows, words

from quantkit import assets
from quantkit.calibration import text as module
from quantkit.calibration.documents import Document
from quantkit.calibration.text import token_windows
from quantkit.errors import DataError
from quantkit.recipe.recipe import Calibration

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
    document = Document("a.txt", "")
    notes = module._notes(document, torch.tensor([usual, 1, 2, 3]), 1, 4, strange)
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


def test_a_tokenizer_that_fails_on_a_text_names_the_text(tokenizer):
    class Failing:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, **keywords):
            if isinstance(text, list):
                raise KeyError("x")
            return tokenizer(text, **keywords)

    with pytest.raises(DataError, match=r"calibration\.txt: the tokenizer fails on this text: KeyError"):
        windows(Failing())
