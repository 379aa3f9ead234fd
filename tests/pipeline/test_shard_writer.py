"""`ShardWriter`: what a part became is on disk, verified and journalled, or nothing is."""

import pytest
import torch

import quantkit
from quantkit.errors import ModelError
from quantkit.pipeline import quantize as module
from quantkit.pipeline.block import BlockResult

pytestmark = pytest.mark.usefixtures("steady")


class Caught(Exception):
    """Ends a run where a test looks into it."""


@pytest.fixture
def writer(arguments, tmp_path, monkeypatch):
    """The shard writer of a run that has not written anything."""
    found = []

    def stop(run, writer):
        found.append(writer)
        raise Caught

    monkeypatch.setattr(module, "produce", stop)
    with pytest.raises(Caught):
        quantkit.quantize(**arguments("rtn", tmp_path / "out"))
    return found[0]


def test_a_part_without_result_is_copied_and_counted(writer):
    assert writer.finished() == 0
    writer.commit(0, BlockResult())
    assert writer.finished() == 1
    (entry,) = writer.journal.entries
    assert {each["how"] for each in entry["account"].values()} == {"copied"}
    assert entry["account"].keys() == {info.name for info in writer.run.parts[0].values()}
    assert (writer.run.output / entry["written"]["file"]).is_file()


def test_what_a_transform_changed_is_written_as_it_is_now(writer):
    name = "model.layers.0.input_layernorm.weight"
    changed = torch.full((64,), 0.5, dtype=torch.bfloat16)
    writer.commit(0, BlockResult(changed={name: changed}))
    assert writer.journal.entries[0]["account"][name] == {"how": "rescaled", "became": [name]}


def test_a_weight_that_belongs_to_no_source_tensor_is_refused(writer):
    with pytest.raises(ModelError, match="without a source tensor"):
        writer.commit(0, BlockResult(weights={"model.layers.9.mlp.up_proj": None}))
    assert not writer.journal.entries
    assert not list(writer.run.output.glob("*.safetensors"))
