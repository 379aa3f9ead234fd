"""How blocks are called: what depends on the tokens is found, kept for each chunk, and dictionaries are copied."""

from collections import namedtuple

import pytest
import tiny_models
import torch

from quantkit.calibration.calls import BlockCalls, differing, leaves, mappings, rebuilt, record, spelled
from quantkit.calibration.forward import Call
from quantkit.errors import ModelError

Pair = namedtuple("Pair", "a b")
TREE = ((torch.ones(2), Pair(1, None)), {"mask": [torch.zeros(1), "text"], "cache": {"k": 3}})


def test_a_tree_is_rebuilt_with_its_own_types_and_leaves():
    same = rebuilt(TREE, lambda at, value: value)
    assert [at for at, _ in leaves(same)] == [at for at, _ in leaves(TREE)]
    assert all(a is b for (_, a), (_, b) in zip(leaves(same), leaves(TREE), strict=True))
    assert type(same[0][1]) is Pair
    assert same[1]["cache"] is not TREE[1]["cache"]
    at = (1, "mask", 1)
    changed = dict(leaves(rebuilt(TREE, lambda place, value: "new" if place == at else value)))
    assert changed[at] == "new"
    assert dict(leaves(TREE))[at] == "text"
    assert [spelled(place) for place, _ in leaves(TREE)][:4] == [
        "argument 1",
        "argument 2.0",
        "argument 2.1",
        "mask.0",
    ]


def test_only_tensors_may_depend_on_the_tokens():
    def call(x, number=1):
        return Call((x,), {"same": torch.ones(2), "number": number})

    assert differing(call(torch.ones(2)), call(torch.ones(2))) == ()
    assert differing(call(torch.ones(2)), call(torch.zeros(2))) == ((0, 0),)
    assert differing(call(torch.ones(2)), call(torch.ones(3))) == ((0, 0),)
    for other in (2, None, "x"):
        with pytest.raises(
            ModelError, match=r"argument number of a decoder block depends on the tokens.*rtn"
        ):
            differing(call(torch.ones(2)), call(torch.ones(2), other))


def test_a_chunk_gets_its_own_values_and_its_own_dictionary():
    cache: dict = {}
    call = Call((torch.zeros(2, 3),), {"cache": cache, "fixed": torch.ones(1)})
    one = Call((torch.zeros(1, 3),), call.kwargs)
    calls = BlockCalls(
        {2: call, 1: one}, ((0, 0),), {0: [torch.full((2, 3), 5.0)], 2: [torch.full((1, 3), 7.0)]}
    )
    first, last = calls.at(slice(0, 2), 2), calls.at(slice(2, 3), 1)
    assert (first.args[0].unique().item(), last.args[0].unique().item()) == (5, 7)
    assert calls.at(slice(0, 2), 1).args[0].shape == (1, 3)
    assert first.kwargs["fixed"] is call.kwargs["fixed"]
    first.kwargs["cache"]["k"] = 1
    assert (last.kwargs["cache"], cache) == ({}, {})
    shared = {"cache": {"k": torch.arange(2), "kv": (torch.arange(2), torch.arange(2))}}
    given = calls.at(slice(0, 2), 1, shared).kwargs["cache"]
    assert given["k"].tolist() == [0]
    assert [t.tolist() for t in given["kv"]] == [[0], [0]]
    assert list(mappings(call)) == ["cache"]


@pytest.mark.parametrize(("name", "varies"), [("llama-gqa", []), ("gemma2", []), ("gemma4", ["argument 1"])])
def test_arguments_that_depend_on_the_tokens_are_found(name, varies):
    model = tiny_models.build(name)
    windows = tiny_models.ids(24, batch=5, vocabulary=100)
    chunks = {}
    calls = record(model, tiny_models.blocks(model), windows, 2, torch.device("cpu"), chunks.__setitem__)
    hidden = torch.cat(list(chunks.values()))
    assert list(chunks) == [0, 2, 4]
    assert hidden.shape == (5, 24, 64)
    for number, block in enumerate(calls):
        assert [spelled(place) for place in block.varying] == varies
        for start in (0, 2, 4) if varies else ():
            chunk = slice(start, min(start + 2, 5))
            wanted = tiny_models.captured_calls(model, windows[chunk])[number]
            assert torch.equal(block.at(chunk, chunk.stop - start).args[0], wanted[1][0])
