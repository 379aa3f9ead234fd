"""The walk alone: what it yields, what it carries, and that several may share one model."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantkit.algorithms.catalog import algorithm
from quantkit.calibration.forward import embed, finish
from quantkit.calibration.streams import Streams
from quantkit.calibration.walk import Wanted, walk
from quantkit.checkpoint.shards import write_shard
from quantkit.errors import ModelError
from quantkit.models import skeleton
from quantkit.models.headers import read_checkpoint
from quantkit.models.source import Source
from quantkit.plan import build_plan
from quantkit.recipe.recipe import parse_recipe

GPTQ = {"weights": {"algorithm": {"name": "gptq", "retarget": 0.0}, "bits": 4, "group_size": 16}}
COARSE = {"weights": {"algorithm": {"name": "gptq", "retarget": 0.0}, "bits": 2, "group_size": 16}}
ROUNDED = {"weights": {"algorithm": "rtn", "bits": 4, "group_size": 16}}


def ids(windows=5, length=24):
    return tiny_models.ids(length, batch=windows, vocabulary=100)


class Checkpoint:
    """A tiny model on disk, its skeleton, and plans for it."""

    def __init__(self, name, folder, **overrides):
        tiny_models.save(tiny_models.build(name, **overrides), folder)
        self.folder = folder
        self.source = Source(read_checkpoint(folder))
        self.model = skeleton.build(self.source)

    def plan(self, recipe):
        calibration = {"sequence_length": 24}
        return build_plan(parse_recipe(recipe | {"calibration": calibration}), self.source.headers)

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


@pytest.mark.parametrize("name", ["llama-gqa", "gemma4-shared"])
def test_a_walk_goes_on_from_kept_streams(tmp_path, monkeypatch, name):
    """Hidden states, and what blocks hand on beside them, are the same after a file and from memory."""
    monkeypatch.setattr("quantkit.calibration.walk.chunk_windows", lambda plan, windows: 2)
    checkpoint, wanted = Checkpoint(name, tmp_path / "model"), Wanted(4, True, behind_last=True)
    count, kept = 0, []
    for run in checkpoint.walk(wanted=wanted):
        run.leave()
        write_shard(tmp_path / f"streams-{run.index + 1}", run.streams.to_tensors())
        kept.append(run.streams.to_tensors())
        kept[-1] = {k: t.clone() for k, t in kept[-1].items()}
        count += 1
    for start in range(1, count):
        streams = Streams.from_tensors(load_file(tmp_path / f"streams-{start}"))
        for run in checkpoint.walk(wanted=wanted, start=start, streams=streams):
            last = run
        found = last.streams.to_tensors()
        assert found.keys() == kept[-1].keys()
        assert all(torch.equal(found[n], kept[-1][n]) for n in found)
    assert any("shared" in n for n in kept[-1]) == (name == "gemma4-shared")


def test_hidden_states_of_another_shape_are_refused():
    """The blocks of Gemma 3n take four of them at once."""
    model = tiny_models.build("llama")

    model.model.embed_tokens.register_forward_hook(lambda module, args, out: torch.stack([out, out]))
    with pytest.raises(ModelError, match=r"hidden states of shape \[2, 5, 24, 64\] for \[5, 24\] tokens"):
        embed(model, tiny_models.blocks(model), ids())


def test_a_block_that_was_left_is_not_advanced_again(llama):
    walked = llama.walk()
    run = next(walked)
    run.leave()
    behind = run.streams.quantized.clone()
    run.leave()
    following = next(walked)
    assert torch.equal(following.streams.quantized, behind)
    assert not hasattr(run, "module")


@pytest.mark.parametrize("name", [*tiny_models.CONFIGS, *tiny_models.BY_TOKENS])
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
            found = finish(checkpoint.model, blocks, hidden, windows[chunk], last.form)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
