"""`quantize_in_memory`: a recipe applied to a model that is loaded, without writing a file.

The run is that of `quantize`, block by block; what a block became goes into the model instead of a shard. So number
formats that no file format stores (NF4) can be used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from quantkit.calibration.streams import Streams
from quantkit.checkpoint.load import lay_out, load
from quantkit.errors import OutputError, memory_named
from quantkit.formats.registry import MEMORY
from quantkit.layers.kv_cache import attach
from quantkit.layers.quant_linear import QuantLinear
from quantkit.models import skeleton
from quantkit.models.borders import quiet
from quantkit.models.experts import Experts
from quantkit.models.parallel import ParallelLinears
from quantkit.numerics.inputs import InputScale
from quantkit.numerics.weight import QuantizedWeight
from quantkit.pipeline.block import BlockResult
from quantkit.pipeline.kept_streams import Nothing
from quantkit.pipeline.produce import produce
from quantkit.pipeline.progress import Progress, Silent
from quantkit.pipeline.quantize import prepared
from quantkit.pipeline.run import Run
from quantkit.plan import LayerPlan
from quantkit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@memory_named()
@quiet(bars=False)
def quantize_in_memory(
    recipe: Recipe | str | Path | Mapping[str, Any],
    model: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Quantize a causal LM by a recipe and return it, as `load` would return it from a checkpoint; no file is written.

    recipe, model, overrides, progress: as of `quantize`; the recipe's output is ignored. device: where blocks are
    calibrated and the model is put. dtype, backend: as of `load`. Every number format that a kernel has can be used,
    NF4 too. Memory: the whole model, unlike `quantize`. Nothing is evaluated. Raises the errors of `quantize` and
    `load`; `save_pretrained` of the result is an OutputError.
    """
    run = prepared(recipe, model, None, overrides, device, None, progress or Silent(), in_memory=True)
    loaded = load(run.source.headers.path, device=str(run.device), dtype=dtype)
    _take_apart(run, loaded)
    produce(run, _Into(run, loaded))
    lay_out(loaded, backend)
    cache = run.recipe.kv_cache
    if cache is not None:
        attach(loaded, cache.scheme, None)
    vars(loaded)["save_pretrained"] = partial(
        _refuse, sorted({str(layer.scheme) for layer in run.plan.layers})
    )
    run.progress.finish()
    loaded.eval()
    return loaded


def _take_apart(run: Run, model: nn.Module) -> None:
    """Give every expert of a loaded mixture linears of its own, as the skeleton has them, where one is planned."""
    planned = {layer.module for layer in run.plan.layers}
    for name, experts in run.model.named_modules():
        if isinstance(experts, Experts | ParallelLinears) and any(
            each.startswith(f"{name}.") for each in planned
        ):
            model.set_submodule(name, experts.with_weights(model.get_submodule(name)))


def _refuse(schemes: list[str], *_: Any, **__: Any) -> NoReturn:
    raise OutputError(
        f"a model that was quantized in memory ({'; '.join(schemes)}) is not written to files; use quantkit.quantize "
        "with a recipe whose schemes compressed-tensors stores"
    )


class _Into:
    """Takes the place of a `ShardWriter`: what a part became goes into the model."""

    def __init__(self, run: Run, model: nn.Module) -> None:
        self.run, self.model, self.journal = run, model, Nothing()
        self.plans = {layer.name: layer for layer in run.plan.layers}
        self.tied = skeleton.tied(run.model)

    def finished(self) -> int:
        return 0

    def streams(self, done: int) -> Streams | None:
        return None

    def put_aside(self, part: int, result: BlockResult) -> None:
        """The model takes it with its block."""

    def commit(self, part: int, result: BlockResult, streams: Streams | None = None) -> None:
        for name, tensor in result.changed.items():
            self.model.get_parameter(name).data.copy_(tensor)
        for name, weight in result.weights.items():
            plan, first = self.plans[name], 0
            for module in plan.modules:
                dense: Any = self.model.get_submodule(module)
                last = first + dense.out_features if plan.split else plan.shape[0]
                self._put(module, dense, weight.rows(slice(first, last)), plan, result.inputs.get(name))
                first = last

    def _put(
        self, name: str, dense: Any, weight: QuantizedWeight, plan: LayerPlan, ranged: InputScale | None
    ) -> None:
        """Replace a dense linear by a packed one, also where other blocks share it. ranged: its static inputs."""
        bias = None if dense.bias is None else dense.bias.data
        packed = QuantLinear.from_quantized(weight, bias, MEMORY, plan.scheme.inputs, ranged)
        packed.replaces = type(dense)
        shared = [n for n, target in self.tied.items() if target == f"{name}.weight"]
        for module in (name, *(n.removesuffix(".weight") for n in shared)):
            self.model.set_submodule(module, packed.to(dense.weight.device))
