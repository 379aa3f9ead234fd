"""Only the beginning of a long text is tokenized, and its tokens are those of the whole text."""

import hashlib
import zlib

import pytest
from quantkit_eval import EvalError, windows
from quantkit_eval.text import Text
from quantkit_eval.windows import first_tokens, tokenize
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quantkit import assets

BOOK = assets.evaluation_text().read_text()[:24_000]
TEXTS = {
    "prose": BOOK,
    "one line": BOOK.replace("\n", " "),
    "line breaks in runs": BOOK.replace("\n", "\n\n \n"),
    "spaces in runs": BOOK.replace(" ", "   ").replace(".", ".\t\t \n   "),
    "other scripts": "".join(chr(c) + " " * (c % 7 == 0) + "\n" * (c % 31 == 0) for c in range(0x370, 0x450))
    * 6,
    "joined characters": "e\u0301👩\u200d🚀 \u1100\u1161\n" * 1500,
}


def trained(model, trainer, pre=None, normalizer=None):
    core = Tokenizer(model)
    if pre:
        core.pre_tokenizer = pre
    if normalizer:
        core.normalizer = normalizer
    lines = [line for text in TEXTS.values() for line in text[:20_000].splitlines(keepends=True)]
    core.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def bpe(pre=None, normalizer=None):
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=["<unk>"])
    return trained(models.BPE(unk_token="<unk>"), trainer, pre, normalizer)


def unigram():
    trainer = trainers.UnigramTrainer(
        vocab_size=600, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]
    )
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(split=False))


def wordpiece():
    trainer = trainers.WordPieceTrainer(vocab_size=600, show_progress=False, special_tokens=["[UNK]"])
    model = models.WordPiece(unk_token="[UNK]")
    normal = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    return trained(model, trainer, pre_tokenizers.BertPreTokenizer(), normal)


TOKENIZERS = {
    "byte level": lambda: AutoTokenizer.from_pretrained(assets.default_model(), trust_remote_code=False),
    "bpe over the whole text": bpe,  # as Llama 2 and Gemma: merges know no words
    "bpe with spaces marked": lambda: bpe(None, normalizers.Replace(" ", "▁")),
    "unigram over the whole text": unigram,
    "wordpiece, ends stripped": wordpiece,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(windows, "WHOLE", 500)
    monkeypatch.setattr(windows, "CHARACTERS", 2)
    monkeypatch.setattr(windows, "CHECKED", 400)
    monkeypatch.setattr("quantkit_eval.text._PIECE", 1000)


@pytest.mark.parametrize("name", TEXTS)
def test_the_first_tokens_are_those_of_the_whole_text(any_tokenizer, name, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[name])
    whole = tokenize(any_tokenizer, TEXTS[name])
    for most in (1, 64, 333, len(whole) - 1, len(whole) + 1):
        assert first_tokens(any_tokenizer, Text(path), most) == whole[:most], most
    assert first_tokens(any_tokenizer, Text(path), None) == whole


class Counting:
    """A tokenizer that remembers the longest text it was given."""

    def __init__(self, tokenizer):
        self.inner, self.longest = tokenizer, 0

    def __call__(self, text, **options):
        self.longest = max(self.longest, len(text))
        return self.inner(text, **options)


def test_what_is_not_needed_is_not_tokenized(any_tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(BOOK)
    counting = Counting(any_tokenizer)
    first_tokens(counting, Text(path), 200)
    assert 0 < counting.longest < len(BOOK) / 8


def test_a_tokenizer_that_looks_far_ahead_gets_what_it_looks_at(tmp_path):
    """Tokens that depend on the next 3000 characters: the text is read on until they do not change."""

    class FarSighted:
        def __call__(self, text, **options):
            return {
                "input_ids": [zlib.crc32(text[i : i + 3000].encode()) for i in range(min(200, len(text)))]
            }

    path = tmp_path / "text.txt"
    path.write_text(BOOK)
    assert first_tokens(FarSighted(), Text(path), 50) == FarSighted()(BOOK)["input_ids"][:50]


def test_the_digest_is_of_the_whole_text(any_tokenizer, tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_bytes(BOOK.replace("\n", "\r\n").encode())
    text = Text(paths)
    first_tokens(any_tokenizer, text, 100)
    assert text.sha256() == hashlib.sha256(f"{BOOK}\n\n{BOOK}".encode()).hexdigest()


def test_damage_behind_what_is_needed_is_told(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(BOOK.encode() + b"\xff")
    with pytest.raises(EvalError, match="is not UTF-8 text"):
        Text(path).sha256()
