"""The walk alone: what it yields, what it carries, and that several may share one model."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from quantkit.algorithms.catalog import algorithm
from quantkit.calibration.forward import finish
from quantkit.calibration.walk import Wanted, walk
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.plan import build_plan
from quantkit.recipe import parse_recipe

GPTQ = {"weights": {"algorithm": {"name": "gptq", "retarget": 0.0}, "bits": 4, "group_size": 16}}
COARSE = {"weights": {"algorithm": {"name": "gptq", "retarget": 0.0}, "bits": 2, "group_size": 16}}
ROUNDED = {"weights": {"algorithm": "rtn", "bits": 4, "group_size": 16}}


def ids(windows=5, length=24):
    return tiny_models.ids(length, batch=windows, vocabulary=100)


class Checkpoint:
    """A tiny model on disk, its skeleton, and plans for it."""

    def __init__(self, name, folder, **overrides):
        tiny_models.save(tiny_models.FAMILIES[name](**overrides), folder)
        self.folder = folder
        self.source = Source(read_checkpoint(folder))
        self.model = skeleton.build(self.source)

    def plan(self, recipe):
        return build_plan(parse_recipe(recipe), self.source.headers)

    def walk(self, recipe=ROUNDED, wanted=Wanted(0, True), windows=None, **options):  # noqa: B008  (frozen)
        windows = ids() if windows is None else windows
        return walk(self.model, self.source, self.plan(recipe), windows, wanted, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Checkpoint("llama-gqa", tmp_path_factory.mktemp("llama"))


def quantized(run):
    """Quantize a block by the algorithm of its plans, one set of siblings after the other; the codes by name."""
    for siblings in run.trace.siblings:
        config = run.plans[siblings[0]].algorithm
        statistics = run.collect([siblings], {siblings: algorithm(config.name).needs(config)})
        for name in siblings:
            plan, held = run.plans[name], run.held[name]
            outcome = algorithm(plan.algorithm.name).quantize(
                held.weight.float(),
                replace(statistics[siblings]),
                plan.scheme.weights,
                torch.float32,
                plan.algorithm,
            )
            held.quantized = outcome.weight
        run.finished(siblings)
    return {f"{run.name}.{n}": m.quantized.codes for n, m in run.held.items()}


def test_two_walks_over_one_model_do_not_disturb_each_other(llama):
    """Two recipes side by side, block by block, without a file written: each gives what it gives alone."""
    files = sorted(llama.folder.iterdir())
    alone = [[quantized(run) for run in llama.walk(recipe)] for recipe in (GPTQ, COARSE)]
    together = [], []
    for fine, coarse in zip(llama.walk(GPTQ), llama.walk(COARSE), strict=True):
        together[0].append(quantized(fine))
        together[1].append(quantized(coarse))
    for wanted, found in zip(alone, together, strict=True):
        assert [list(codes) for codes in wanted] == [list(codes) for codes in found]
        assert all(torch.equal(w[n], f[n]) for w, f in zip(wanted, found, strict=True) for n in w)
    assert any(not torch.equal(a[n], b[n]) for a, b in zip(*alone, strict=True) for n in a)
    assert sorted(llama.folder.iterdir()) == files
    assert {p.device.type for p in llama.model.parameters()} == {"meta"}


def test_a_walk_goes_on_from_kept_streams(llama):
    whole = [run.streams.quantized.clone() for run in llama.walk()]
    first = next(llama.walk())
    first.leave()
    kept = type(first.streams).from_tensors(first.streams.to_tensors())
    rest = [run.streams.quantized.clone() for run in llama.walk(start=1, streams=kept)]
    assert len(rest) == len(whole) - 1
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))


def test_a_block_that_was_left_is_not_advanced_again(llama):
    walked = llama.walk()
    run = next(walked)
    run.leave()
    behind = run.streams.quantized.clone()
    run.leave()
    following = next(walked)
    assert torch.equal(following.streams.quantized, behind)
    assert not hasattr(run, "module")


@pytest.mark.parametrize("name", list(tiny_models.CONFIGS))
def test_behind_the_last_block_are_the_models_own_logits(tmp_path, monkeypatch, name):
    """In both streams, for every chunk of windows, as no weight is quantized."""
    checkpoint, windows = Checkpoint(name, tmp_path), ids()
    monkeypatch.setattr("quantkit.calibration.walk.chunk_windows", lambda plan, windows: 2)
    for run in checkpoint.walk(wanted=Wanted(len(windows), True, behind_last=True), windows=windows):
        last = run
    prefix, blocks = skeleton.find_blocks(checkpoint.model, last.name.rpartition(".")[0])
    skeleton.load_outside(checkpoint.model, checkpoint.source, prefix)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for chunk in (slice(0, 2), slice(2, 4), slice(4, 5)):
        with torch.no_grad():
            wanted = reference(input_ids=windows[chunk]).logits
        for full in (True, False):
            hidden = last.streams.of(full)[chunk]
            found = finish(checkpoint.model, blocks, hidden, windows[chunk], last.as_tuple)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
