"""Windows: every token of the text is scored once, behind as much context as the protocol gives."""

import pytest
import tiny_models
import torch
from quantkit_eval import EvalError
from quantkit_eval.windows import context_of, cut, first_token, tokenize


def scored(windows):
    return [token for window in windows for token in window.ids[-window.scored :].tolist()]


def test_windows_without_overlap_leave_out_only_their_first_token():
    windows = cut(list(range(20)), 5)
    assert [w.ids.tolist() for w in windows] == [list(range(i, i + 5)) for i in range(0, 20, 5)]
    assert scored(windows) == [i for i in range(20) if i % 5]


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_strided_windows_score_each_token_once(stride):
    windows = cut(list(range(17)), 5, stride)
    last = int(windows[-1].ids[-1])
    assert scored(windows) == list(range(1, last + 1))
    assert 17 - 1 - last < stride
    assert [w.scored for w in windows[1:]] == [stride] * (len(windows) - 1)


@pytest.mark.parametrize("stride", [None, 5, 4, 3, 2, 1])
def test_behind_a_bos_every_token_is_scored_once(stride):
    windows = cut(list(range(10, 26)), 5, stride, bos=1)
    assert all(w.ids[0] == 1 and len(w.ids) == 5 for w in windows)
    assert scored(windows) == list(range(10, 10 + len(scored(windows))))
    assert len(scored(windows)) > 16 - 4


def test_the_stride_of_a_whole_context_is_the_default():
    for bos in (None, 1):
        assert [w.scored for w in cut(list(range(30)), 6, 6, bos)] == [
            w.scored for w in cut(list(range(30)), 6, None, bos)
        ]


def test_max_tokens_caps_the_text():
    assert int(cut(list(range(100)), 5, max_tokens=12)[-1].ids[-1]) == 9


def test_a_text_of_exactly_one_window_is_enough():
    assert len(cut(list(range(5)), 5)) == 1
    assert len(cut(list(range(4)), 5, bos=1)) == 1


@pytest.mark.parametrize(
    ("count", "context", "keywords", "told"),
    [
        (4, 5, {}, "4 tokens, one window needs 5"),
        (0, 5, {}, "0 tokens, one window needs 5"),
        (9, 5, {"stride": 0}, "stride must be 1 to the context 5, got 0"),
        (9, 5, {"stride": 6}, "stride must be 1 to the context 5, got 6"),
        (9, 5, {"max_tokens": 4}, "max_tokens 4 is less than one window of 5"),
    ],
)
def test_what_cannot_be_cut_is_told_with_its_numbers(count, context, keywords, told):
    with pytest.raises(EvalError, match=told):
        cut(list(range(count)), context, **keywords)


def test_bos_is_found_only_where_the_tokenizer_adds_it(tokenizer, with_bos):
    assert first_token(tokenizer) is None
    assert first_token(with_bos) == tokenizer.bos_token_id


def test_the_text_is_tokenised_in_one_call(tokenizer):
    text = "ab\n\n" * 40_000
    ids = tokenize(tokenizer, text)
    assert len(ids) == len(text)
    assert ids[:4] == tokenizer.convert_tokens_to_ids(list("ab\n\n"))


def test_the_context_is_the_least_of_2048_and_what_the_models_hold(model, scripted):
    longer = scripted(None, longest=4096)
    unknown = scripted(None, longest=None)
    assert context_of([model], None) == 128
    assert context_of([longer], None) == 2048
    assert context_of([unknown], None) == 2048
    assert context_of([longer, model], None) == 128
    assert context_of([longer], 4096) == 4096


@pytest.mark.parametrize(("wanted", "told"), [(1, "at least 2"), (129, "beyond the model's 128")])
def test_a_context_out_of_reach_is_refused(model, wanted, told):
    with pytest.raises(EvalError, match=told):
        context_of([model], wanted)


def test_gpt2_tells_its_context_by_another_name():
    assert context_of([tiny_models.FAMILIES["gpt2"]()], None) == 128


def test_window_ids_are_integers():
    assert cut([1, 2, 3], 2)[0].ids.dtype == torch.int64
