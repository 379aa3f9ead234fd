"""`Streams`: what is written to a file comes back, and only tensors are carried between blocks."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.calibration.streams import Streams, kept
from quantkit.errors import ModelError


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def streams(seed):
    """Both streams or one, and dictionaries with tensors and tuples under numbers and names."""
    draw = random.Random(seed)
    found = Streams(
        *draw.choice([(some(4, 3, 2), some(4, 3, 2, seed=1)), (some(2, 3, 2), None), (None, some(4, 3, 2))])
    )
    for number in range(draw.randrange(4)):
        value = draw.choice(
            [some(2, 2, seed=number), tuple(some(2, seed=i) for i in range(draw.randrange(1, 12)))]
        )
        place = draw.choice(["argument 1", "shared.0", 'with "quotes"'])
        at = found.shared.setdefault((draw.choice([True, False]), draw.randrange(3)), {})
        at.setdefault(place, {})[draw.choice([0, 7, "layer", "0"])] = value
    return found


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return type(other) is tuple and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return one is other


@pytest.mark.parametrize("seed", range(20))
def test_a_file_gives_the_same_streams(tmp_path, seed):
    given = streams(seed)
    save_file(given.to_tensors(), tmp_path / "s.safetensors")
    found = Streams.from_tensors(load_file(tmp_path / "s.safetensors"))
    assert same(given.full, found.full)
    assert same(given.quantized, found.quantized)
    assert same(given.shared, found.shared)


def test_layers_see_the_quantized_stream_where_there_is_one():
    full, quantized = some(2, 3, 4), some(4, 3, 4, seed=1)
    both, alone = Streams(full, quantized), Streams(full, None)
    assert both.leading is both.of(False) is quantized
    assert alone.leading is alone.of(True) is full
    assert [both.has(True, slice(n, n + 2)) for n in (0, 1, 2)] == [True, True, False]
    assert not alone.has(False, slice(0, 1))
    with pytest.raises(ValueError, match="the quantized stream is not carried"):
        alone.of(False)
    with pytest.raises(ValueError, match="at least one stream"):
        _ = Streams(None, None).leading


def test_what_blocks_share_is_copied_contiguous_and_without_gradients():
    given = some(3, 4).T.requires_grad_()
    found = kept("argument 1", {0: given, "pair": [given, given]})
    assert found[0].is_contiguous()
    assert not found[0].requires_grad
    assert isinstance(found["pair"], tuple)
    with torch.no_grad():
        given.zero_()
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("mapping", "told"), [({0: "text"}, "share a str through x"), ({(0, 1): torch.ones(1)}, "under the key")]
)
def test_what_cannot_be_carried_is_refused(mapping, told):
    with pytest.raises(ModelError, match=told):
        kept("x", mapping)
