"""What stands in for a block returns as many values as the block."""

import pytest
import torch
from torch import nn

from quantkit.calibration.forward import Call
from quantkit.calibration.returned import returned, seen_on_meta, wrapped


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
