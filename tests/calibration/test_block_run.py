"""`BlockRun`: what a block is asked for leaves its streams and weights as they were, until it is advanced."""

import pytest
import tiny_models
import torch

from quantkit.calibration.walk import Wanted, walk
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.numerics.inputs import InputScale
from quantkit.plan import build_plan
from quantkit.recipe.recipe import parse_recipe
from quantkit.scheme import INT8_TOKEN, NUMBERS, Grid

RECIPE = {
    "weights": {"algorithm": "gptq", "bits": 4, "group_size": 16},
    "calibration": {"sequence_length": 24},
}
NEEDS = frozenset({"hessian", "mean_abs"})
COARSE = Grid(NUMBERS["int8"], "tensor")
WINDOWS = tiny_models.ids(24, batch=5, vocabulary=100)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The first block of a tiny model, its five windows in chunks of two."""
    monkeypatch.setattr("quantkit.calibration.walk.chunk_windows", lambda plan, windows: 2)
    source = Source(read_checkpoint(tiny_models.save(tiny_models.build("llama-gqa"), tmp_path)))
    plan = build_plan(parse_recipe(RECIPE), source.headers)
    walked = walk(skeleton.build(source), source, plan, WINDOWS, Wanted(4, True))
    yield next(walked)
    walked.close()


def test_chunks_cover_every_window_once(run):
    covered = [n for chunk in run.chunks() for n in range(chunk.start, chunk.stop)]
    assert covered == list(range(len(WINDOWS)))
    assert run.streams.full.shape[0] == 4


def test_statistics_in_one_pass_are_those_of_a_pass_for_each(run):
    sets = list(run.trace.siblings)
    together = run.collect(sets, dict.fromkeys(sets, NEEDS))
    assert together.keys() == set(sets)
    for siblings in sets:
        alone = run.collect([siblings], {siblings: NEEDS})[siblings]
        torch.testing.assert_close(together[siblings].hessian, alone.hessian)
        assert together[siblings].tokens == alone.tokens == WINDOWS.numel()
    assert run.collect(sets, dict.fromkeys(sets, frozenset())) == {}


def test_asking_changes_neither_the_quantized_stream_nor_the_weights(run):
    before = run.streams.quantized.clone()
    weights = {name: p.clone() for name, p in run.module.named_parameters()}
    run.observe(["", "mlp"], 3)
    run.collect([run.trace.siblings[0]], {run.trace.siblings[0]: NEEDS})
    assert torch.equal(run.streams.quantized, before)
    assert all(torch.equal(p, weights[name]) for name, p in run.module.named_parameters())


def test_what_is_observed_reaches_as_far_as_was_asked(run):
    for windows, chunks in ((1, 1), (2, 1), (3, 2), (99, 2)):  # the full stream has four windows
        seen = run.observe(["", "mlp"], windows)
        assert [len(calls) for calls in seen.values()] == [chunks, chunks]
    args, kwargs, out = seen["mlp"][0]
    torch.testing.assert_close(run.output(run.module.get_submodule("mlp"), args, kwargs), out)
    assert torch.equal(seen[""][0][2], run.forward(slice(0, 2), full=True))


def test_both_streams_arrive_together_while_nothing_is_quantized(run):
    sets = list(run.trace.siblings)
    run.collect(sets, dict.fromkeys(sets, NEEDS))  # the full stream has advanced with this
    run.advance()
    torch.testing.assert_close(run.streams.full, run.streams.quantized[:4])


def test_statistics_are_of_rounded_inputs_and_ranges_of_unrounded_ones(run):
    siblings = run.trace.siblings[0]
    plain = run.ranges([siblings], "range")[siblings]
    seen = [args[0] for args, _, _ in run.observe([siblings[0]], 5)[siblings[0]]]
    assert float(plain.high) >= max(float(x.amax()) for x in seen)
    before = run.collect([siblings], {siblings: NEEDS})[siblings].hessian
    for name in siblings:
        run.held[name].inputs = COARSE
        run.held[name].input_scale = InputScale(torch.tensor([1.0]))
    after = run.collect([siblings], {siblings: NEEDS})[siblings].hessian
    inputs = torch.cat([run.streams.quantized[c] for c in run.chunks()])
    rounded = run.module.get_submodule("input_layernorm")(inputs).round().clamp(-128, 127).flatten(0, 1)
    torch.testing.assert_close(after, 2 / len(rounded) * rounded.T @ rounded)
    assert not torch.allclose(before, after, rtol=1e-3)
    again = run.ranges([siblings], "counts")[siblings]
    assert torch.equal(again.high, plain.high)
    assert int(again.counts.sum()) == inputs.numel()


def test_siblings_that_round_differently_get_statistics_of_unrounded_inputs(run):
    siblings = run.trace.siblings[0]
    before = run.collect([siblings], {siblings: NEEDS})[siblings].hessian
    run.held[siblings[0]].inputs = INT8_TOKEN
    assert torch.equal(run.collect([siblings], {siblings: NEEDS})[siblings].hessian, before)
