"""What stands in for a block returns as many values as the block."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quantkit.calibration.forward import Call, block_form, embed
from quantkit.calibration.returned import Form, returned, seen_on_meta, stacked, wrapped
from quantkit.errors import ModelError


class Block(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.linear, self.give = nn.Linear(4, 4), give

    def forward(self, hidden, *, mask):
        return self.give(self.linear(hidden) * mask)


FORMS = {
    "alone": (lambda h: h, None),
    "pair": (lambda h: (h, None), (tuple, 2)),
    "list of three": (lambda h: [h, h.sum(), None], (list, 3)),
    "one that looks at values": (lambda h: (h, float(h.sum())), None),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_seen_without_weights(name):
    give, form = FORMS[name]
    block, hidden = Block(give), torch.ones(1, 3, 4)
    assert seen_on_meta(block, hidden, Call((), {"mask": torch.ones(4)})) == form
    assert not block.linear.weight.is_meta


@pytest.mark.parametrize("form", [None, (tuple, 1), (tuple, 3), (list, 2)])
def test_wrapped_hidden_states_have_the_form(form):
    hidden = torch.ones(1, 3, 4)
    out = wrapped(hidden, form)
    assert returned(out) == form
    assert (out if form is None else out[0]) is hidden


class Model(nn.Module):
    """Two linear blocks; `run` says what happens to hidden states in and between them."""

    def __init__(self, run):
        super().__init__()
        self.embedding, self.run = nn.Embedding(8, 4), run
        self.config = SimpleNamespace(model_type="made up")
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, input_ids, use_cache=False):
        return self.run(self.embedding(input_ids), *self.blocks)


ORDERS = {
    "twice": (lambda h, a, b: b(a(b(a(h)))), "runs its blocks in the order 0, 1, 0, 1"),
    "changed": (lambda h, a, b: b(a(h) / 2), "changes the hidden states before block 1"),
    "changed in place": (lambda h, a, b: b(a(h).mul_(2)), "changes the hidden states before block 1"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_model_that_does_not_hand_hidden_states_on_is_refused(name):
    run, reason = ORDERS[name]
    model = Model(run)
    with pytest.raises(ModelError, match=reason):
        block_form(model, model.blocks, torch.ones(1, 3, dtype=torch.long))


def test_a_model_that_does_is_not():
    model = Model(lambda h, a, b: b(a(h)))
    assert block_form(model, model.blocks, torch.ones(1, 3, dtype=torch.long)) == Form()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_windows_that_are_not_first_are_found(axis):
    model = Model(lambda h, a, b: b(a(h.movedim(0, axis).contiguous())))
    ids = torch.ones(1, 3, dtype=torch.long)
    form = block_form(model, model.blocks, ids)
    assert form == Form(axis=axis)
    hidden, calls = embed(model, model.blocks, ids.expand(2, -1), form=form)
    assert hidden.shape == (2, 3, 4)
    assert [call.axis for call in calls] == [axis, axis]
    assert torch.equal(stacked(calls[0](nn.Identity(), hidden), axis), hidden)


def test_a_model_that_wants_more_than_a_text_is_refused_by_name():
    class Sees(Model):
        def forward(self, input_ids, pixel_values, use_cache=False):
            return super().forward(input_ids, use_cache)

    model = Sees(lambda h, a, b: b(a(h)))
    with pytest.raises(ModelError, match="Sees does not run on a text alone, its forward wants pixel_values"):
        block_form(model, model.blocks, torch.ones(1, 3, dtype=torch.long))
