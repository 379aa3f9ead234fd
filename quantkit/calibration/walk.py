"""The block walk: calibration windows go through the model one decoder block at a time.

`walk` loads a block, yields it, advances the hidden states and frees it again. It writes nothing and knows no method:
whatever works on blocks is a `for` loop over it. Between `forward.embed` and `forward.finish` the blocks run one by
one, and without quantization the walk gives the whole model's logits. Memory is one block, the streams [windows,
length, hidden], and one chunk of windows, whatever the depth (what blocks are passed of the tokens comes on top, see
calls.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.calibration.block_forward import Groups
from quantkit.calibration.block_run import BlockRun
from quantkit.calibration.calls import BlockCalls, record
from quantkit.calibration.collect import Gatherer
from quantkit.calibration.experts import expert_stages
from quantkit.calibration.forward import Stop, block_form, embed, finish
from quantkit.calibration.held import HeldLinear
from quantkit.calibration.memory import give_back
from quantkit.calibration.ranks import ALONE, Ranks
from quantkit.calibration.returned import Form, returned
from quantkit.calibration.spill import GENEROUS, Thrift
from quantkit.calibration.streams import Streams
from quantkit.errors import ModelError
from quantkit.models import skeleton
from quantkit.models.source import Source
from quantkit.models.tensors import torch_dtype
from quantkit.numerics.statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.plan import LayerPlan, Plan

CHUNK_ELEMENTS = 1 << 20  # tokens per chunk x widest layer; larger chunks spend their time in page faults
Timed = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Wanted:
    """Which hidden states a walk carries.

    full: windows of the original model's. quantized: whether those behind the quantized blocks are carried, for all
    windows. behind_last: whether they are wanted behind the last block too, for what runs after it.
    """

    full: int = 0
    quantized: bool = True
    behind_last: bool = False


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    source: Source,
    plan: Plan,
    windows: torch.Tensor,
    wanted: Wanted,
    device: torch.device | str = "cpu",
    start: int = 0,
    streams: Streams | None = None,
    timed: Timed = nullcontext,
    now: Callable[[], float] = time.perf_counter,
    ranks: Ranks = ALONE,
    thrift: Thrift = GENEROUS,
) -> Iterator[BlockRun]:
    """Yield every decoder block from `start` on, ready to be worked on, and carry the hidden states through it.

    model: a skeleton on meta; it is on meta again after the walk, and several walks may share it. windows: token ids
    [windows, length]. start, streams: go on at a block with the hidden states at its input, as an earlier walk left
    them. timed: called with "load" or "calibrate" for a context around that work. now: the clock of
    `BlockRun.seconds_once`, which for the first block includes the embedding of all windows. ranks: the processes that
    walk together, each with its own of the windows, which the streams are of. thrift: how memory is saved.

    What is quantized in a block (`HeldLinear.quantized`) changes the quantized stream behind it. A block is advanced
    and freed when the walk goes on, or when `BlockRun.leave` is called.
    """
    if start >= plan.n_blocks:
        return
    device, begin = torch.device(device), now()
    prefix, blocks = skeleton.find_blocks(model, plan.blocks_prefix)
    with timed("calibrate"):
        batch = ranks.chunk(len(windows), chunk_windows(plan, windows))
        full = len(ranks.numbers(min(len(windows), -(-wanted.full // batch) * batch), batch))
        windows = ranks.own(windows, batch)
        skeleton.load_outside(
            model, source, prefix, skeleton.head_tensors(model), device=device
        )  # an untied head gives nothing that is needed here
        begun = _Begun(len(windows), full if wanted.full else None, wanted.quantized, thrift)
        keep = begun.keep if streams is None else None
        calls = record(model, blocks, windows, batch, device, keep, cached=plan.kv is not None)
        streams = streams or begun.streams
        skeleton.free_outside(model, prefix)
        give_back()
    once = now() - begin
    known: dict[tuple[Any, ...], Groups] = {}
    for index in range(start, plan.n_blocks):
        run = _open(
            model, source, plan, index, streams, calls[index], batch, device, known, timed, now, ranks, thrift
        )
        run.seconds_once, once = once, 0.0
        run.last = index + 1 == plan.n_blocks and not wanted.behind_last
        yield run
        with timed("calibrate"):
            run.leave()
        del run


class _Begun:
    """The hidden states before block 0, chunk by chunk as they are computed.

    full: windows of the original model's; None: that stream is not carried; 0 in a process that has none of them.
    """

    def __init__(self, windows: int, full: int | None, quantized: bool, thrift: Thrift) -> None:
        self._rows = {"quantized": windows if quantized else None, "full": full}
        self._empty = torch.empty if thrift.spill is None else thrift.spill.empty
        self.streams = Streams(None, None)

    def keep(self, first: int, hidden: torch.Tensor) -> None:
        """Take in the windows from `first` on."""
        for name, windows in self._rows.items():
            if windows is None:
                continue
            if first == 0:
                setattr(self.streams, name, self._empty(windows, *hidden.shape[1:], dtype=hidden.dtype))
            stop = min(windows, first + len(hidden))
            if stop > first:
                getattr(self.streams, name)[first:stop] = hidden[: stop - first].cpu()


def chunk_windows(plan: Plan, windows: torch.Tensor) -> int:
    """How many windows run at once."""
    widest = max((max(layer.shape) for layer in plan.layers), default=plan.widest)
    return max(1, min(len(windows), CHUNK_ELEMENTS // (windows.shape[1] * widest)))


def _open(
    model: PreTrainedModel,
    source: Source,
    plan: Plan,
    index: int,
    streams: Streams,
    calls: BlockCalls,
    batch: int,
    device: torch.device,
    known: dict[tuple[Any, ...], Groups],
    timed: Timed,
    now: Callable[[], float],
    ranks: Ranks,
    thrift: Thrift,
) -> BlockRun:
    """Load one block with its planned linears held in their stored dtype."""
    name = f"{plan.blocks_prefix}.{index}"
    plans = {m.removeprefix(f"{name}."): p for p in plan.layers if p.block == index for m in p.modules}
    held = skeleton.places(model).by_parameter
    stored = {
        n.removeprefix(f"{name}."): torch_dtype(source.raw(parts[0].disk).dtype)
        for n, parts in held.items()
        if n.startswith(f"{name}.")
    }
    with timed("load"):
        as_stored = {f"{name}.{n}.{leaf}" for n in plans for leaf in ("weight", "bias")}
        module = skeleton.load_block(
            model, source, index, device=device, stored=as_stored, blocks_prefix=plan.blocks_prefix
        )
        stages = expert_stages(module, plans, stored, partial(_read, model, source, name), thrift.spill)
        plans = {n: p for n, p in plans.items() if not any(n.startswith(f"{s.name}.") for s in stages)}
        _hold(module, plans)

    def free() -> None:
        for stage in stages:
            stage.close()
        skeleton.free_block(model, index, plan.blocks_prefix)

    with timed("calibrate"):
        run = BlockRun(
            index,
            name,
            module,
            plans,
            stored,
            streams,
            calls,
            batch,
            device,
            known,
            free,
            now,
            stages,
            ranks,
            thrift.kept,
        )
    run.model_type = source.headers.text_type
    return run


def _read(
    model: PreTrainedModel, source: Source, block: str, linear: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias or None) of a linear of an expert, by its name inside the block."""
    return skeleton.read_linear(model, source, f"{block}.{linear}")


def _hold(module: nn.Module, plans: dict[str, LayerPlan]) -> None:
    """Swap the planned linears of a loaded block for `HeldLinear`; they stay in their stored dtype."""
    for name, plan in plans.items():
        linear = module.get_submodule(name)
        weight = linear.get_parameter("weight").data
        weight = weight.T.contiguous() if plan.transposed else weight
        parent = module.get_submodule(name.rpartition(".")[0])
        bias = None if linear.bias is None else linear.get_parameter("bias").data
        setattr(parent, name.rpartition(".")[2], HeldLinear(weight, bias, plan.scheme.inputs))


@torch.no_grad()
def inputs_after_blocks(
    model: PreTrainedModel,
    source: Source,
    plan: Plan,
    windows: torch.Tensor,
    streams: Streams,
    name: str,
    fields: frozenset[str],
    device: torch.device,
    rounded: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    ranks: Ranks = ALONE,
) -> Statistics:
    """Statistics of the input of a linear that runs after the blocks (the head), from the streams behind them.

    rounded: how the linear rounds its inputs. ranks: as of `walk`.
    """
    prefix, blocks = skeleton.find_blocks(model, plan.blocks_prefix)
    batch = ranks.chunk(len(windows), chunk_windows(plan, windows))
    windows = ranks.own(windows, batch)
    skeleton.load_outside(model, source, prefix, skeleton.head_tensors(model), device=device)
    form = _form(model, source, plan, windows, device)
    gatherer: Gatherer | None = None
    for start in range(0, len(windows), batch):
        chunk = slice(start, start + batch)
        seen: dict[bool, torch.Tensor] = {}
        for full in (False, True):
            if not streams.has(full, chunk):
                continue

            def hook(
                module: nn.Module,
                args: tuple[Any, ...],
                which: bool = full,
                into: dict[bool, torch.Tensor] = seen,
            ) -> None:
                into[which] = args[0]
                raise Stop

            handle = model.get_submodule(name).register_forward_pre_hook(hook)
            try:
                hidden = streams.of(full)[chunk].to(device)
                finish(model, blocks, hidden, windows[chunk].to(device), form)
            except Stop:
                pass
            finally:
                handle.remove()
            if full not in seen:
                raise ModelError(
                    f"{name} does not run after the decoder blocks; give it `algorithm: rtn` or a skip rule"
                )
        x = seen[False] if False in seen else seen[True]
        gatherer = gatherer or Gatherer(fields, x.shape[-1], device)
        gatherer.update(rounded(x), seen.get(True))
    skeleton.free_outside(model, prefix)
    assert gatherer is not None
    return gatherer.finish(ranks)


def _form(
    model: PreTrainedModel, source: Source, plan: Plan, windows: torch.Tensor, device: torch.device
) -> Form:
    """How the blocks return their hidden states, seen on one window through the first one."""
    prefix, blocks = skeleton.find_blocks(model, plan.blocks_prefix)
    ids = windows[:1].to(device)
    hidden, calls = embed(model, blocks, ids, form=block_form(model, blocks, ids))
    block = skeleton.load_block(model, source, 0, device=device, blocks_prefix=prefix)
    expert_stages(block, {}, {}, partial(_read, model, source, f"{prefix}.0"))  # they answer with zeros
    out = calls[0](block, hidden)
    skeleton.free_block(model, 0, prefix)
    return Form(returned(out), calls[0].axis)
