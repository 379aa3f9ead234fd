"""Killed at any moment, the same command goes on and ends with the same bytes."""

import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import interrupt
import pytest
from transformers import AutoConfig

import quantkit
from quantkit.checkpoint.journal import read_lines
from quantkit.checkpoint.manifest import read_manifest
from quantkit.errors import OutputError, QuantkitError
from quantkit.pipeline.block import BlockResult

pytestmark = pytest.mark.usefixtures("steady")

SHARD = "model-{:05d}-of-00005.safetensors".format
STREAMS = "streams-{:05d}.safetensors".format
MOMENTS = {
    "the journal is new": ("renamed", "journal.jsonl"),
    "during a shard write": ("write", SHARD(2) + ".tmp"),
    "before a shard is synced": ("fsync", SHARD(3) + ".tmp"),
    "before a shard is renamed": ("rename", SHARD(1)),
    "between rename and journal line": ("renamed", SHARD(3)),
    "during a journal line": ("write", "journal.jsonl"),
    "before a journal line is synced": ("fsync", "journal.jsonl"),
    "during the last shard": ("write", SHARD(5) + ".tmp"),
    "while a tokenizer file is written": ("write", "tokenizer.json.tmp"),
    "while the index is written": ("write", "model.safetensors.index.json.tmp"),
    "while the config is written": ("write", "config.json.tmp"),
    "between config and manifest": ("renamed", "config.json"),
    "while the manifest is written": ("write", "quantkit.json.tmp"),
    "while the journal is removed": ("unlink", "journal.jsonl"),
}
STREAM_MOMENTS = {
    "while the hidden states are written": ("write", STREAMS(2) + ".tmp"),
    "between hidden states and journal line": ("renamed", STREAMS(3)),
    "while old hidden states are removed": ("unlink", STREAMS(2)),
}


def files(folder):
    """Contents of everything in the folder but the one file that may differ."""
    kept = (f for f in Path(folder).rglob("*") if f.is_file() and f.name != "quantkit.run.json")
    return {str(f.relative_to(folder)): f.read_bytes() for f in kept}


@pytest.fixture(scope="module")
def server():
    server = interrupt.Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory):
    """reference(recipe name) -> (files of an uninterrupted run, all its moments in order)."""
    known = {}

    def make(name):
        if name not in known:
            labels = []
            folder = tmp_path_factory.mktemp("reference") / "out"
            with interrupt.watching(lambda *label: labels.append(label)):
                quantkit.quantize(**arguments(name, folder))
            known[name] = files(folder), labels
        return known[name]

    return make


@pytest.fixture
def computed(monkeypatch):
    """Names of the linears that are quantized in this process."""
    names = []
    add = BlockResult.add

    def spy(result, plan, *rest):
        names.append(plan.name)
        add(result, plan, *rest)

    monkeypatch.setattr(BlockResult, "add", spy)
    return names


def moment_of(labels, label, seed=0):
    """The number of a moment: one of those with this label."""
    return random.Random(seed).choice([i for i, one in enumerate(labels) if one == label])


def finished_parts(folder):
    return {entry["part"] for entry in read_lines(folder / ".quantkit/journal.jsonl")[0][1:]}


def assert_not_finished(folder):
    assert not (folder / "quantkit.json").exists()
    if not (folder / "config.json").exists():
        with pytest.raises((OSError, ValueError)):
            AutoConfig.from_pretrained(folder)


def assert_completes(given, wanted, done, computed):
    """The same command computes what is not in `done`, and only that, and gives the wanted files."""
    result = quantkit.quantize(**given)
    assert files(given["output"]) == wanted
    parts = Counter(int(n.split(".")[2]) if n.startswith("model.") else 4 for n in computed)
    assert parts == dict.fromkeys(set(range(4)) - done, 7) | ({4: 1} if 4 in parts else {})
    assert not (4 in parts and 4 in done)
    assert result.report.resumed_blocks == len(done - {4})


def interrupted(server, name, labels, moment, arguments, folder):
    """Kill a run at the moment; the keyword arguments of the run."""
    given = arguments(name, folder)
    assert server.run(moment, given), f"never reached {labels[moment]}"
    return given


@pytest.mark.parametrize(
    ("name", "moment"),
    [pytest.param("rtn", m, marks=pytest.mark.slow) for m in list(MOMENTS)[::3]]
    + [("gptq", m) for m in [*list(MOMENTS)[::2], *STREAM_MOMENTS]]
    + [pytest.param("gptq", m, marks=pytest.mark.slow) for m in list(MOMENTS)[1::2]],
)
def test_killed_at_named_moment(server, reference, arguments, computed, tmp_path, name, moment):
    wanted, labels = reference(name)
    computed.clear()
    number = moment_of(labels, (MOMENTS | STREAM_MOMENTS)[moment])
    given = interrupted(server, name, labels, number, arguments, tmp_path / "out")
    if moment == "while the journal is removed":
        before = files(tmp_path / "out")
        assert {n: b for n, b in before.items() if not n.startswith(".quantkit")} == wanted
        quantkit.quantize(**given)
        assert not computed
        assert files(tmp_path / "out") == wanted
        return
    assert_not_finished(tmp_path / "out")
    assert_completes(given, wanted, finished_parts(tmp_path / "out"), computed)


@pytest.mark.parametrize(
    ("name", "seed"),
    [("gptq", 0), ("awq", 4), ("gptq with head", 5)]
    + [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in [("gptq", 1), ("smoothquant", 6), ("smoothquant_plus", 7), ("static", 8)]
    ],
)
def test_killed_twice_at_random(server, reference, arguments, computed, tmp_path, name, seed):
    wanted, labels = reference(name)
    computed.clear()
    random_ = random.Random(seed)
    last = labels.index(("renamed", "quantkit.json"))
    first = random_.randrange(last)
    given = interrupted(server, name, labels, first, arguments, tmp_path / "out")
    server.run(random_.randrange(last - first), given)
    assert_not_finished(tmp_path / "out")
    assert_completes(given, wanted, finished_parts(tmp_path / "out"), computed)


def test_killed_before_the_head(server, reference, arguments, computed, tmp_path):
    """The hidden states after the last block are kept when a linear outside the blocks needs them."""
    name = "gptq with head"
    wanted, labels = reference(name)
    computed.clear()
    number = moment_of(labels, ("write", SHARD(5) + ".tmp"))
    given = interrupted(server, name, labels, number, arguments, tmp_path / "out")
    assert_completes(given, wanted, {0, 1, 2, 3}, computed)
    assert computed == ["lm_head"]


def test_killed_during_the_evaluation(server, arguments, computed, tmp_path):
    """The weights are published: nothing is quantized again, and the same command adds the evaluation."""
    labels = []
    given = arguments("rtn", tmp_path / "whole", evaluate=True)
    with interrupt.watching(lambda *label: labels.append(label)):
        quantkit.quantize(**given)
    wanted = files(tmp_path / "whole")
    given = arguments("rtn", tmp_path / "out", evaluate=True)
    assert server.run(labels.index(("evaluate", "")), given)
    assert read_manifest(tmp_path / "out").evaluation is None
    computed.clear()
    result = quantkit.quantize(**given)
    assert not computed
    assert files(tmp_path / "out") == wanted
    assert result.manifest.evaluation.quantized.perplexity > 1


def test_lost_or_damaged_hidden_states_start_over(server, reference, arguments, computed, tmp_path, progress):
    wanted, labels = reference("gptq")
    number = moment_of(labels, ("renamed", SHARD(4)))
    for damage in (Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?")):
        folder = tmp_path / damage.__name__
        given = interrupted(server, "gptq", labels, number, arguments, folder)
        damage(folder / ".quantkit" / STREAMS(3))
        computed.clear()
        result = quantkit.quantize(**given, progress=progress)
        assert files(folder) == wanted
        assert len(computed) == 28
        assert result.report.resumed_blocks == 0
        assert any("hidden states of the interrupted run are gone" in text for text in progress.messages)


def test_a_damaged_shard_is_made_again(server, reference, arguments, computed, tmp_path):
    wanted, labels = reference("rtn")
    computed.clear()
    number = moment_of(labels, ("renamed", SHARD(4)))
    given = interrupted(server, "rtn", labels, number, arguments, tmp_path / "out")
    shard = tmp_path / "out" / SHARD(2)
    shard.write_bytes(shard.read_bytes()[:-3])
    assert_completes(given, wanted, {0}, computed)


def test_a_second_process_is_refused(server, reference, arguments, tmp_path):
    _, labels = reference("rtn")
    given = arguments("rtn", tmp_path / "out")
    stopped = server.run(moment_of(labels, ("renamed", SHARD(2))), given, by=signal.SIGSTOP)
    assert stopped
    before = files(tmp_path / "out")
    try:
        with pytest.raises(OutputError, match="in use by another quantkit process"):
            quantkit.quantize(**given)
        assert files(tmp_path / "out") == before
    finally:
        os.kill(stopped, signal.SIGKILL)


def test_the_same_text_under_another_path_is_the_same_run(arguments, inputs, tmp_path):
    """Name and digest of the text are written down, not where it was."""
    asked = arguments("gptq", tmp_path / "out")
    first = quantkit.quantize(**asked)
    moved = tmp_path / "elsewhere" / "renamed.txt"
    moved.parent.mkdir()
    moved.write_bytes((inputs / "text").read_bytes())
    asked["recipe"]["calibration"] = asked["recipe"]["calibration"] | {"data": [str(moved)]}
    second = quantkit.quantize(**asked)
    assert second.manifest == first.manifest
    written = (tmp_path / "out" / "quantkit.json").read_text()
    assert str(inputs) not in written
    source = first.manifest.calibration.sources[0]
    assert (source["name"], source["samples"], len(source["sha256"])) == ("text", 8, 64)
    moved.write_text(moved.read_text()[::-1])
    with pytest.raises(OutputError, match="data: "):
        quantkit.quantize(**asked)


@pytest.mark.parametrize("where", [".quantkit/journal.jsonl", "quantkit.json"])
def test_a_flipped_bit_never_ends_in_other_numbers(server, reference, arguments, tmp_path, where):
    """Of an interrupted run's journal or a finished run's manifest: the same files as ever, or a refusal."""
    wanted, labels = reference("rtn")
    given = arguments("rtn", tmp_path / "out")
    if where == "quantkit.json":
        quantkit.quantize(**given)
    else:
        interrupted(
            server, "rtn", labels, moment_of(labels, ("renamed", SHARD(4))), arguments, tmp_path / "out"
        )
    refusals = []
    for seed in range(6):
        folder = shutil.copytree(tmp_path / "out", tmp_path / str(seed))
        raw, choose = bytearray((folder / where).read_bytes()), random.Random(seed)
        raw[choose.randrange(len(raw))] ^= 1 << choose.randrange(8)
        (folder / where).write_bytes(raw)
        try:
            quantkit.quantize(**arguments("rtn", folder))
        except QuantkitError as error:
            refusals.append(str(error))
            quantkit.quantize(**arguments("rtn", folder), resume=False)
        assert files(folder) == wanted
    assert all("--no-resume" in refusal for refusal in refusals)
    assert refusals or where != "quantkit.json"
