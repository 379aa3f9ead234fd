"""Pieces put together are the whole text, and no piece ends inside a character."""

import pytest
from quantkit_eval.detokenizer import Detokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({"</s>": 256} | {c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


class SpaceStripping:
    """Decodes words as SentencePiece does: the space in front of the first one is dropped."""

    def decode(self, ids, **_):
        return "".join(f" word{i}" for i in ids)[1:]


def stream(tokenizer, prompt, tokens):
    text = Detokenizer(tokenizer, prompt)
    return [*(text.push(token) for token in tokens), text.finish()]


def test_characters_of_several_bytes_come_whole(byte_tokenizer):
    text = "aé€😀 b"
    tokens = byte_tokenizer(text)["input_ids"]
    assert len(tokens) == 1 + 2 + 3 + 4 + 2
    pieces = stream(byte_tokenizer, byte_tokenizer("hello ")["input_ids"], tokens)
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", " ", "b", ""]


def test_a_character_cut_off_at_the_end_is_told_at_the_end(byte_tokenizer):
    tokens = byte_tokenizer("ok😀")["input_ids"][:-1]
    assert stream(byte_tokenizer, [], tokens) == ["o", "k", "", "", "", "\ufffd"]


def test_bytes_that_are_no_character_do_not_stop_the_stream(byte_tokenizer):
    broken = byte_tokenizer("é")["input_ids"][1:]
    tokens = broken + byte_tokenizer("ab")["input_ids"]
    assert "".join(stream(byte_tokenizer, [], tokens)) == "\ufffdab"


def test_a_prompt_that_ends_in_the_same_text_is_not_repeated(byte_tokenizer):
    tokens = byte_tokenizer("éé")["input_ids"]
    assert "".join(stream(byte_tokenizer, tokens, tokens)) == "éé"


def test_the_space_of_the_first_word_is_kept():
    assert stream(SpaceStripping(), [1, 2], [3, 4]) == [" word3", " word4", ""]


def test_special_tokens_are_silent(byte_tokenizer):
    tokens = byte_tokenizer("a</s>b")["input_ids"]
    assert 256 in tokens
    assert "".join(stream(byte_tokenizer, [], tokens)) == "ab"


def test_only_the_end_is_decoded_again(byte_tokenizer):
    lengths = []

    class Counting:
        def decode(self, ids, **keywords):
            lengths.append(len(ids))
            return byte_tokenizer.decode(ids, **keywords)

    stream(Counting(), [], byte_tokenizer("a" * 200)["input_ids"])
    assert max(lengths) <= 6
