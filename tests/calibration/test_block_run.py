"""`BlockRun`: what a block is asked for leaves its streams and weights as they were, until it is advanced."""

import pytest
import tiny_models
import torch

from quantkit.calibration.walk import Wanted, walk
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.plan import build_plan
from quantkit.recipe import parse_recipe

RECIPE = {
    "weights": {"algorithm": "gptq", "bits": 4, "group_size": 16},
    "calibration": {"sequence_length": 24},
}
NEEDS = frozenset({"hessian", "mean_abs"})
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
