"""Shard in, shard out: a block is calibrated, quantized, written, verified and journalled before the next is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file

from quantkit.algorithms.catalog import algorithm
from quantkit.calibration.forward import embed
from quantkit.calibration.held import HeldLinear
from quantkit.calibration.text import Windows
from quantkit.calibration.walk import CHUNK_ELEMENTS, BlockRun, Streams, inputs_after_blocks
from quantkit.checkpoint.journal import Journal
from quantkit.checkpoint.shards import Written, write_shard
from quantkit.checkpoint.verify import digest_file, verify_shard
from quantkit.errors import ModelError
from quantkit.formats.registry import codec
from quantkit.models import skeleton
from quantkit.models.source import Source
from quantkit.models.tensors import TensorInfo, torch_dtype
from quantkit.numerics.statistics import Statistics
from quantkit.pipeline.block import BlockResult, quantize_block
from quantkit.pipeline.clock import Clock
from quantkit.pipeline.memory import give_back
from quantkit.pipeline.smooth import Smoother
from quantkit.plan import LayerPlan, Plan
from quantkit.recipe import Recipe


class Producer:
    """Writes the weight shards of one run: one per decoder block, and one for everything outside the blocks."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        source: Source,
        model: torch.nn.Module,
        windows: Windows | None,
        device: torch.device,
        journal: Journal,
        clock: Clock,
        progress: Any,
    ) -> None:
        self.recipe, self.plan, self.source, self.windows = recipe, plan, source, windows
        self.model = model  # on meta, checked against the checkpoint
        self.device, self.journal, self.clock, self.progress = device, journal, clock, progress
        self.output = journal.output
        self.codec = codec(recipe.output.format)
        self.smoother = Smoother(tuple(recipe.transforms))
        self.by_block: dict[int | None, dict[str, LayerPlan]] = {}
        for layer in plan.layers:
            self.by_block.setdefault(layer.block, {})[layer.name] = layer
        self.parts = self._partition()

    @staticmethod
    def needs_calibration(recipe: Recipe, plan: Plan) -> bool:
        """Whether any layer needs text to be quantized."""
        return bool(recipe.transforms) or any(_needs(layer) for layer in plan.layers)

    def _partition(self) -> list[dict[str, TensorInfo]]:
        """The source tensors of every shard, by module tensor name: the blocks in order, then the rest."""
        prefix = f"{self.plan.blocks_prefix}."
        parts: list[dict[str, TensorInfo]] = [{} for _ in range(self.plan.n_blocks + 1)]
        headers = self.source.headers
        for disk, name in headers.module_names.items():
            if disk not in headers.dropped:
                number = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else ""
                parts[int(number) if number.isdigit() else -1][name] = headers.tensors[disk]
        return parts

    def run(self) -> int:
        """Write all shards; returns how many blocks an earlier run had already finished."""
        done = self._finished_before()
        total = self.plan.n_blocks
        self.progress.start(total, f"{self.source.headers.path.name} -> {self.output}")
        resumed = min(done, total)
        if done <= total:
            with _full_precision():
                done = self._walk(done) if self._walks(done) else self._round(done)
        self.progress.finish()
        return resumed

    def _finished_before(self) -> int:
        """Shards of an earlier run that are still what the journal says, if the run can go on after them."""
        for count, entry in enumerate(self.journal.entries):
            path = self.output / entry["written"]["file"]
            if not path.is_file() or digest_file(path) != entry["written"]["sha256"]:
                self.journal.forget_after(count)
                break
        done = len(self.journal.entries)
        if done and self._walks(done):
            kept = self.journal.streams(done)
            if not kept.is_file() or digest_file(kept) != self.journal.entries[-1].get("streams"):
                self.progress.message(
                    "the hidden states of the interrupted run are gone; starting from block 0"
                )
                self.journal.forget_after(0)
                return 0
        return done

    def _walks(self, done: int) -> bool:
        """Whether hidden states are needed to go on after `done` shards."""
        total = self.plan.n_blocks
        return self.windows is not None and done <= total and (done < total or bool(self.by_block.get(None)))

    # without calibration: tensor by tensor ---------------------------------------------------------------------

    def _round(self, done: int) -> int:
        for part in range(done, self.plan.n_blocks + 1):
            self._announce(part)
            result = BlockResult()
            for plan in self._plans(part).values():
                with self.clock("load"):
                    weight = self._weight(plan).float()
                with self.clock("quantize"):
                    config = plan.algorithm
                    stored = self._stored(part)[f"{plan.name}.weight"]
                    outcome = algorithm(config.name).quantize(
                        weight, Statistics(), plan.scheme.weights, stored, config
                    )
                    result.add(plan, weight, outcome)
            self._commit(part, result)
        return self.plan.n_blocks + 1

    # with calibration: block by block -----------------------------------------------------------------------------

    def _walk(self, done: int) -> int:
        total = self.plan.n_blocks
        prefix, blocks = skeleton.find_blocks(self.model, self.plan.blocks_prefix)
        streams = self._streams(done, blocks)
        for index in range(done, total):
            self._announce(index)
            with self.clock("load"):
                held = {f"{n}.{leaf}" for n in self._plans(index) for leaf in ("weight", "bias")}
                module = skeleton.load_block(
                    self.model, self.source, index, device=self.device, stored=held, blocks_prefix=prefix
                )
                self._hold(module, f"{prefix}.{index}.", index)
            local = {n.removeprefix(f"{prefix}.{index}."): p for n, p in self._plans(index).items()}
            stored = {n.removeprefix(f"{prefix}.{index}."): d for n, d in self._stored(index).items()}
            with self.clock("calibrate"):
                run = BlockRun(index, module, streams, self.calls[index], self.batch, self.device)
            with self.clock("transform"):
                changed, scaling = self.smoother.apply(run, local, stored)
            weight_dtype = {n: stored[f"{n}.weight"] for n in local}
            result = quantize_block(run, local, weight_dtype, self.clock)
            result.changed = {f"{prefix}.{index}.{n}": t for n, t in changed.items()}
            result.scaling = scaling
            if index + 1 < total or self.by_block.get(None):
                with self.clock("calibrate"):
                    run.advance()
            del run
            skeleton.free_block(self.model, index, prefix)
            del module
            give_back()
            self._commit(index, result, streams)
        if done <= total:
            self._announce(total)
            self._commit(total, self._outside(streams, blocks))
        return total + 1

    def _streams(self, done: int, blocks: torch.nn.ModuleList) -> Streams:
        """The hidden states at the input of the next block: kept by an earlier run, or from the embeddings."""
        with self.clock("calibrate"):
            self._load_outside()
            ids = self.windows.ids
            widest = max([*(max(layer.shape) for layer in self.plan.layers), 1])
            self.batch = max(1, min(len(ids), CHUNK_ELEMENTS // (ids.shape[1] * widest)))
            per_size = {}
            for size in {1, self.batch, len(ids) % self.batch or self.batch}:
                per_size[size] = embed(self.model, blocks, ids[:size].to(self.device))[1]
            self.calls = [{size: calls[i] for size, calls in per_size.items()} for i in range(len(blocks))]
            if done:
                # clones: mapped pages count as resident and are not aligned, which may change a matmul's last bit
                stored = {k: t.clone() for k, t in load_file(self.journal.streams(done)).items()}
                streams = Streams(stored.get("full"), stored.get("quantized"))
            else:
                hidden = torch.cat(
                    [embed(self.model, blocks, c.to(self.device))[0].cpu() for c in ids.split(self.batch)]
                )
                full, quantized = self._wanted_streams()
                streams = Streams(hidden[:full].clone() if full else None, hidden if quantized else None)
            skeleton.free_outside(self.model, self.plan.blocks_prefix)
            give_back()
        return streams

    def _load_outside(self) -> None:
        """Everything outside the blocks but an untied head, whose output nothing here needs."""
        skip = skeleton.head_tensors(self.model)
        skeleton.load_outside(self.model, self.source, self.plan.blocks_prefix, skip, device=self.device)

    def _wanted_streams(self) -> tuple[int, bool]:
        """(windows of the full-precision stream, whether a quantized one is carried).

        full: what transforms look at, what re-targeting aims at (half the windows, see docs/LOG.md), and what
        data-aware rounding weighs by. quantized: what GPTQ compensates for.
        """
        every = len(self.windows.ids)
        fields = frozenset().union(*(_needs(layer) for layer in self.plan.layers))
        quantized = "hessian" in fields
        full = max((t.windows for t in self.recipe.transforms), default=0)
        if "drift" in fields:
            full = max(full, -(-every // 2))
        if fields and not quantized:
            full = every
        return min(every, -(-full // self.batch) * self.batch), quantized

    def _hold(self, module: torch.nn.Module, prefix: str, index: int) -> None:
        """Swap the planned linears of a loaded block for `HeldLinear`; they stay in their stored dtype."""
        for name, plan in self._plans(index).items():
            local = name.removeprefix(prefix)
            linear = module.get_submodule(local)
            weight = linear.weight.data.T.contiguous() if plan.transposed else linear.weight.data
            parent = module.get_submodule(local.rpartition(".")[0])
            bias = None if linear.bias is None else linear.bias.data
            setattr(parent, local.rpartition(".")[2], HeldLinear(weight, bias))

    def _outside(self, streams: Streams, blocks: torch.nn.ModuleList) -> BlockResult:
        """Linears outside the blocks that a rule names (an untied head)."""
        result = BlockResult()
        for name, plan in self.by_block.get(None, {}).items():
            statistics = Statistics()
            if _needs(plan):
                with self.clock("calibrate"):
                    self._load_outside()
                    statistics = inputs_after_blocks(
                        self.model,
                        blocks,
                        streams,
                        self.windows.ids,
                        self.batch,
                        name,
                        _needs(plan),
                        self.device,
                        self._returns_tuple(streams),
                    )
                    skeleton.free_outside(self.model, self.plan.blocks_prefix)
            with self.clock("quantize"):
                weight = self._weight(plan).float().to(self.device)
                stored = self._stored(-1)[f"{name}.weight"]
                outcome = algorithm(plan.algorithm.name).quantize(
                    weight, statistics, plan.scheme.weights, stored, plan.algorithm
                )
                result.add(plan, weight, outcome)
        return result

    def _returns_tuple(self, streams: Streams) -> bool:
        """Whether the blocks return their hidden states in a tuple, seen on one window through the last one."""
        last, prefix = self.plan.n_blocks - 1, self.plan.blocks_prefix
        block = skeleton.load_block(self.model, self.source, last, device=self.device, blocks_prefix=prefix)
        call = self.calls[last][1]
        out = block(streams.leading[:1].to(self.device), *call.args, **call.kwargs)
        skeleton.free_block(self.model, last, prefix)
        return isinstance(out, tuple)

    # shared ----------------------------------------------------------------------------------------------------------

    def _plans(self, part: int) -> dict[str, LayerPlan]:
        return self.by_block.get(part if part < self.plan.n_blocks else None, {})

    def _stored(self, part: int) -> dict[str, torch.dtype]:
        """Stored dtype of every parameter of a shard."""
        return {name: torch_dtype(info.dtype) for name, info in self.parts[part].items()}

    def _weight(self, plan: LayerPlan) -> torch.Tensor:
        weight = self.source.tensor(f"{plan.name}.weight")
        return weight.T.contiguous() if plan.transposed else weight

    def _announce(self, part: int) -> None:
        last = part == self.plan.n_blocks
        self.progress.block(part, "outside the blocks" if last else f"{self.plan.blocks_prefix}.{part}", "")

    def _commit(self, part: int, result: BlockResult, streams: Streams | None = None) -> None:
        """Write one shard, verify it, keep the hidden states for the next block, then journal."""
        total = self.plan.n_blocks
        tensors: dict[str, torch.Tensor | TensorInfo] = {}
        account: dict[str, dict] = {}
        with self.clock("write"):
            for name, info in self.parts[part].items():
                layer, _, leaf = name.rpartition(".")
                if leaf == "weight" and layer in result.weights:
                    packed = {f"{layer}.{k}": t for k, t in self.codec.pack(result.weights[layer]).items()}
                    tensors |= packed
                    account[info.name] = {"how": "quantized", "became": sorted(packed)}
                else:
                    tensors[name] = result.changed.get(name, info)
                    how = "rescaled" if name in result.changed else "copied"
                    account[info.name] = {"how": how, "became": [name]}
            lost = {f"{n}.weight" for n in result.weights} - self.parts[part].keys()
            if lost:
                raise ModelError(f"quantized weights without a source tensor: {sorted(lost)}")
            path = self.output / f"model-{part + 1:05d}-of-{total + 1:05d}.safetensors"
            written: Written = write_shard(path, tensors)
        with self.clock("verify"):
            verify_shard(path, result.weights, self.codec)
        keeps = streams is not None and self._walks(part + 1)
        kept: Written | None = None
        if keeps:
            with self.clock("write"):
                both = {"full": streams.full, "quantized": streams.quantized}
                present = {k: t for k, t in both.items() if t is not None}
                kept = write_shard(self.journal.streams(part + 1), present)
        self.journal.append(
            {
                "part": part,
                "written": asdict(written),
                "account": account,
                "layers": result.layers,
                "scaling": result.scaling,
                "streams": kept.sha256 if kept else None,
            }
        )
        self.journal.drop_streams(part + 1 if keeps else None)


def _needs(plan: LayerPlan) -> frozenset[str]:
    return algorithm(plan.algorithm.name).needs(plan.algorithm)


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 and no autograd while statistics are accumulated; the user's settings come back."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
