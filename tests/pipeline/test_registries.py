"""A new algorithm and a new transform: each its own file, its config in the union, and one import."""

import json
import subprocess
import sys

TOYS = '''
import json, sys
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

import quantkit
from quantkit.algorithms import config as algorithm_configs
from quantkit.transforms import config as transform_configs


class HalvesConfig(BaseModel):
    """Round to nearest after leaving out a share of the range."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: Literal["halves"]
    share: float = 0.5

    @property
    def needs(self):
        return frozenset({"mean_abs"})


class DoubleConfig(BaseModel):
    """Double the inputs of the first scaling group, and halve what makes them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: Literal["double"]
    times: float = 2.0


named = Field(discriminator="name")
algorithm_configs.AlgorithmConfig = Annotated[
    algorithm_configs.RtnConfig | algorithm_configs.GptqConfig | HalvesConfig, named
]
transform_configs.TransformConfig = Annotated[transform_configs.AwqConfig | DoubleConfig, named]

import torch

from quantkit.algorithms.registry import Outcome, register as algorithm
from quantkit.algorithms.rtn import rtn
from quantkit.transforms.registry import register as transform


@algorithm("halves", lambda config: config.needs)
def quantize(weight, statistics, grid, dtype, config):
    assert statistics.mean_abs.shape == (weight.shape[1],)
    top = config.share * weight.abs().amax()
    return Outcome(rtn(weight.clamp(-top, top), grid, dtype), details={"share": config.share})


@transform("double", windows=lambda config: 2)
def apply(run, config):
    groups, _ = run.scaling_groups("leave out the double transform")
    group = next(g for g in groups if g.form == "gamma")
    scale = torch.full((run.module.get_submodule(group.producer).weight.numel(),), config.times)
    moved = run.fold(group, scale, "leave out the double transform")
    return [{"producer": group.producer, "consumers": list(group.consumers), "output_change": moved}]


if __name__ == "__main__":
    result = quantkit.quantize(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], evaluate=False, device="cpu")
    print(json.dumps({key: result.manifest.to_json()[key] for key in ("layers", "scaling")}))
'''


def test_a_toy_algorithm_and_a_toy_transform_from_outside_run(inputs, tmp_path):
    (tmp_path / "toys.py").write_text(TOYS)
    recipe = {
        "weights": {"bits": 4, "group_size": 32, "algorithm": {"name": "halves", "share": 0.8}},
        "transforms": ["double"],
        "rules": [{"match": "*.down_proj", "algorithm": "rtn"}],
        "calibration": {"data": [str(inputs / "text")], "samples": 4, "sequence_length": 32},
    }
    command = [sys.executable, str(tmp_path / "toys.py"), json.dumps(recipe)]
    command += [str(inputs / "model"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    names = {layer["name"].rpartition(".")[2]: layer["algorithm"] for layer in told["layers"]}
    assert names.pop("down_proj") == "rtn"
    assert set(names.values()) == {"halves"}
    assert [s["transform"] for s in told["scaling"]] == ["double"] * 4
    assert all(s["output_change"] < 1e-3 for s in told["scaling"])
