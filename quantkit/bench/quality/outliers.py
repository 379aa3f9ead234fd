"""Write a model with outlier channels that computes exactly what the original computes.

    python -m quantkit.bench.quality.outliers OUT                 # of the embedded model
    python -m quantkit.bench.quality.outliers OUT --model PATH --channels 4 --seed 0

Large models have a few channels of hidden states that are 30 to 100 times larger than the others. They are what makes
8 bits per tensor fail, and small models lack them. In every block, some channels of each norm are multiplied by 32 or
64 and the input columns of all linears behind it divided by the same number, and so are rows of up_proj and columns of
down_proj. Powers of two change no bit of a product, so that the logits stay the same. The places are those that can be
proved by folding (quantkit.structure), without the values of v_proj: the KV caches of large models have no such
channels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from quantkit import assets
from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.walk import Wanted, walk
from quantkit.checkpoint.companions import copy_companions
from quantkit.checkpoint.load import load
from quantkit.checkpoint.shards import Written, shard_name, write_shard
from quantkit.errors import NumericalError, OutputError
from quantkit.files import write_json
from quantkit.models import skeleton
from quantkit.models.companions import find_companions
from quantkit.models.headers import read_checkpoint
from quantkit.models.places import Places
from quantkit.models.source import Source
from quantkit.models.tensors import INDEX, TensorInfo
from quantkit.plan import build_plan
from quantkit.recipe.recipe import parse_recipe
from quantkit.structure.fold import ScalingGroup
from quantkit.structure.trace import matrix

FACTORS = (32.0, 64.0)
CHANNELS = 4  # of each producer
TOLERANCE = 1e-3  # change of the logits relative to their RMS, for norms that store weight - 1
RECIPE = {"weights": {"preset": "W8A16", "algorithm": "rtn"}}  # names the linears; nothing is rounded
INSTEAD = "give another model"


@torch.no_grad()
def inject(output: Path, model: Path, channels: int = CHANNELS, seed: int = 0) -> float:
    """Write `model` with outlier channels to `output`; how far the logits moved, relative to their RMS.

    OutputError if the folder holds anything; NumericalError if the logits are not the original's.
    """
    if output.exists() and any(output.iterdir()):
        raise OutputError(f"{output} is not empty; give a new folder")
    output.mkdir(parents=True, exist_ok=True)
    source = Source(read_checkpoint(model))
    network = skeleton.build(source)
    plan = build_plan(parse_recipe(RECIPE), source.headers, skeleton.places(network))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(source.config.vocab_size, (2, 32), generator=generator)
    shards: list[Written] = []
    rest = dict(source.headers.tensors)
    for run in walk(network, source, plan, ids, Wanted(full=len(ids), quantized=False)):
        for group in _places(run):
            run.fold(group, 1 / _factors(run, group, channels, generator), INSTEAD)
        tensors = _tensors(run, source, skeleton.places(network))
        shards.append(write_shard(output / shard_name(run.index, plan.n_blocks + 1), tensors))
        rest = {name: info for name, info in rest.items() if name not in tensors}
    shards.append(write_shard(output / shard_name(plan.n_blocks, plan.n_blocks + 1), rest))
    _finish(output, source, shards)
    moved = _moved(model, output, ids)
    if not moved < TOLERANCE:
        raise NumericalError(
            f"the logits moved by {moved:.2g} of their RMS (limit {TOLERANCE:g}); store the model in float32 first"
        )
    return moved


def _places(run: BlockRun) -> list[ScalingGroup]:
    """The proved groups of a block, without those that start at a sibling of queries and keys (the values)."""
    values = {n for s in run.trace.siblings if any(map(run.feeds_attention_logits, s)) for n in s}
    return [g for g in run.scaling_groups(INSTEAD)[0] if g.producer not in values]


def _factors(run: BlockRun, group: ScalingGroup, channels: int, generator: torch.Generator) -> torch.Tensor:
    """One factor per channel of a group: 1 but for `channels` of them."""
    rows = group.rows
    width = len(rows) if rows is not None else matrix(run.module.get_submodule(group.producer)).shape[0]
    factors = torch.ones(width)
    chosen = torch.randperm(width, generator=generator)[:channels]
    which = torch.randint(len(FACTORS), (len(chosen),), generator=generator)
    factors[chosen] = torch.tensor(FACTORS)[which]
    return factors


def _tensors(run: BlockRun, source: Source, places: Places) -> dict[str, torch.Tensor | TensorInfo]:
    """The block's tensors by disk name: what may have changed in its stored dtype, the rest to be copied."""
    tensors: dict[str, torch.Tensor | TensorInfo] = {}
    changed = dict(run.changed)
    for name, held in run.held.items():
        weight = held.weight.data.to(run.stored[f"{name}.weight"])
        changed[f"{name}.weight"] = weight.T.contiguous() if run.plans[name].transposed else weight
    for leaf in run.stored:
        for part in places.by_parameter[f"{run.name}.{leaf}"]:
            tensors[part.disk] = changed.get(leaf, source.raw(part.disk))
    return tensors


def _finish(output: Path, source: Source, shards: list[Written]) -> None:
    """Everything beside the shards: the files that travel with the weights, the index and config.json."""
    copy_companions(find_companions(source.path, output), output)
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    total = sum(nbytes for shard in shards for nbytes in shard.tensors.values())
    write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(output / "config.json", dict(source.headers.config))


def _moved(before: Path, after: Path, ids: torch.Tensor) -> float:
    """The largest change of a logit in fp32 between two checkpoints, relative to the RMS of the first one's."""
    old, new = (load(path, device="cpu")(input_ids=ids, use_cache=False).logits for path in (before, after))
    return float((new - old).abs().max() / old.square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--model", type=Path, default=assets.default_model())
    parser.add_argument("--channels", type=int, default=CHANNELS, help="outliers of each producer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moved = inject(arguments.output, arguments.model, arguments.channels, arguments.seed)
    print(f"{arguments.output}: logits moved by {moved:.2g} of their RMS")


if __name__ == "__main__":
    main()
