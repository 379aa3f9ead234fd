"""A block is gone when it is written: nothing of it waits for the garbage collector, so memory does not grow."""

import gc

import pytest
import torch

import quantkit
from quantkit.calibration.held import HeldLinear
from quantkit.pipeline.shard_writer import ShardWriter

pytestmark = pytest.mark.usefixtures("steady")

WEIGHTS = {"bits": 4, "group_size": 32}
RECIPES = {
    "gptq": {"weights": WEIGHTS | {"algorithm": {"name": "gptq", "retarget": 0.0}}},
    "gptq with re-target": {"weights": WEIGHTS | {"algorithm": "gptq"}},
    "awq": {"weights": WEIGHTS | {"algorithm": "rtn"}, "transforms": ["awq"]},
    "awq and gptq": {"weights": WEIGHTS | {"algorithm": "gptq"}, "transforms": ["awq"]},
    "smoothquant_plus": {"weights": WEIGHTS | {"algorithm": "rtn"}, "transforms": ["smoothquant_plus"]},
    "weighted rtn": {"weights": WEIGHTS | {"algorithm": {"name": "rtn", "range": "weighted"}}},
}
SLOW = ("awq", "smoothquant_plus")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RECIPES]
)
def test_nothing_of_a_block_outlives_it(name, inputs, tmp_path, monkeypatch):
    alive: list[tuple[int, int]] = []
    commit = ShardWriter.commit

    def counted(self, part, result, streams=None):
        done = commit(self, part, result, streams)
        del result
        objects = gc.get_objects()
        held = sum(type(each) is HeldLinear for each in objects)
        packed = sum(
            each.nbytes for each in objects if type(each) is torch.Tensor and each.dtype == torch.uint8
        )
        alive.append((held, packed))
        return done

    monkeypatch.setattr(ShardWriter, "commit", counted)
    calibration = {"data": [str(inputs / "text")], "samples": 4, "sequence_length": 32}
    gc.collect()
    gc.disable()
    try:
        quantkit.quantize(
            RECIPES[name] | {"calibration": calibration},
            model=inputs / "model",
            output=tmp_path / "out",
            evaluate=False,
            device="cpu",
        )
    finally:
        gc.enable()
    assert len(alive) > 2
    assert {held for held, _ in alive} == {0}
    assert len({packed for _, packed in alive[:-1]}) == 1, alive
