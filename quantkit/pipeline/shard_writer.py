"""`ShardWriter`: what a block became goes into a shard, is verified there, and only then into the journal."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict

import torch

from quantkit.calibration.streams import Streams
from quantkit.checkpoint.check import digest_file
from quantkit.checkpoint.journal import Journal
from quantkit.checkpoint.records import TensorRecord, plain
from quantkit.checkpoint.shards import shard_name, write_shard
from quantkit.checkpoint.verify import Rounding, verify_shard
from quantkit.errors import ModelError, VerificationError
from quantkit.formats.registry import codec
from quantkit.models import skeleton
from quantkit.models.places import Places
from quantkit.models.tensors import TensorInfo, read_header
from quantkit.pipeline.block import BlockResult
from quantkit.pipeline.kept_streams import KeptStreams
from quantkit.pipeline.run import Run


class ShardWriter:
    """Writes the weight shards of one run, one per decoder block and one for everything outside the blocks."""

    def __init__(self, run: Run, journal: Journal) -> None:
        self.run, self.journal = run, journal
        self._streams = KeptStreams(run, journal.streams)
        self.codec = codec(run.recipe.output.format)
        self.schemes = {layer.name: layer.scheme for layer in run.plan.layers}
        self._sums: dict[str, str] = {}  # of the tensors of experts that are put aside

    def finished(self) -> int:
        """How many shards of an earlier run are still what the journal says, if the run can go on after them."""
        run, journal = self.run, self.journal
        for count, entry in enumerate(journal.entries):
            path = run.output / entry["written"]["file"]
            if not path.is_file() or digest_file(path) != entry["written"]["sha256"]:
                journal.forget_after(count)
                break
        done = len(journal.entries)
        needed = done > 0 and run.needs_streams(done)
        digests = (journal.entries[-1].get("streams") or "") if needed else None
        run.ranks.first((done, digests))
        if digests is not None and not self._streams.there(done, digests):
            run.progress.message("the hidden states of the interrupted run are gone; starting from block 0")
            journal.forget_after(0)
            return 0
        return done

    def streams(self, done: int) -> Streams | None:
        """The hidden states that an earlier run has kept after `done` shards; None at the beginning."""
        return self._streams.load(done) if done else None

    def put_aside(self, part: int, result: BlockResult) -> None:
        """Pack, write and verify an expert in a file of its own, from where `commit` copies its tensors."""
        run = self.run
        with run.clock("write"):
            packed = {name: self._leaves(name, result) for name in result.weights}
            path = self.journal.beside(part, next(iter(packed)))
            tensors = {name: tensor for leaves in packed.values() for name, tensor in leaves.items()}
            self._sums |= write_shard(path, tensors).crc32
        with run.clock("verify"):
            rounding = {n: Rounding(self.schemes[n].inputs, result.inputs.get(n)) for n in packed}
            verify_shard(path, result.weights, self.codec, rounding)
        stored = read_header(path)
        result.aside = {name: {leaf: stored[leaf] for leaf in leaves} for name, leaves in packed.items()}
        result.weights.clear()

    def _leaves(self, layer: str, result: BlockResult) -> dict[str, torch.Tensor]:
        """The stored tensors of a quantized linear by their names."""
        leaves = self.codec.pack_scheme(result.weights[layer], self.schemes[layer], result.inputs.get(layer))
        return {f"{layer}.{leaf}": tensor for leaf, tensor in leaves.items()}

    def commit(self, part: int, result: BlockResult, streams: Streams | None = None) -> None:
        """Keep the hidden states for the next block, pack and write one shard, verify it, then journal.

        streams: the hidden states behind this block, None if nothing was calibrated.
        """
        run, total = self.run, self.run.plan.n_blocks
        kept = self._streams.keep(part, streams)
        with run.clock("write"):
            tensors, account = self._packed(part, result)
            path = run.output / shard_name(part, total + 1)
            written = write_shard(path, tensors)
            del tensors
            for name, crc in self._sums.items():
                if written.crc32[name] != crc:
                    raise VerificationError(f"{path.name}: {name} is not what its expert was written as")
            self._sums.clear()
            self.journal.drop_beside(part)
        with run.clock("verify"):
            rounding = {n: Rounding(self.schemes[n].inputs, result.inputs.get(n)) for n in result.weights}
            verify_shard(path, result.weights, self.codec, rounding, self._cache(result))
        self.journal.append(
            {
                "part": part,
                "written": asdict(written),
                "account": plain(account),
                "layers": plain(result.layers),
                "scaling": result.scaling,
                "experts": result.experts,
                "streams": kept,
            }
        )
        self.journal.streams.drop(*([part + 1] if kept else []))

    def _packed(
        self, part: int, result: BlockResult
    ) -> tuple[dict[str, torch.Tensor | TensorInfo], dict[str, TensorRecord]]:
        """(the tensors of a shard, what became of every source tensor in it)."""
        tensors: dict[str, torch.Tensor | TensorInfo] = {}
        account: dict[str, TensorRecord] = {}
        sources, places = self.run.parts[part], skeleton.places(self.run.model)
        changed = {_one(places, parameter): tensor for parameter, tensor in result.changed.items()}
        done = result.weights.keys() | result.aside.keys()
        whole = _whole_stacks(sources, done)
        for name, info in sources.items():
            layer, _, own = name.rpartition(".")
            if info.expert is not None and info.parts[0].name in whole:
                (stack,) = info.parts
                record = TensorRecord("decoded" if stack.decoded else "copied", [stack.name])
                if stack.name not in tensors:
                    tensors[stack.name] = self.run.source.values(stack) if stack.decoded else stack
            elif own == "weight" and layer in done:
                packed = result.aside.get(layer) or self._leaves(layer, result)
                tensors |= packed
                record = TensorRecord("quantized", sorted(packed))
            else:
                decoded = info.parts and name not in changed
                tensors[name] = self.run.source.tensor(name) if decoded else changed.get(name, info)
                how = "rescaled" if name in changed else "decoded" if decoded else "copied"
                how = "carried" if places.by_disk[name].parameter is None else how
                record = TensorRecord(how, [name])
            for stored in info.stored:
                account[stored.name] = record.beside(account.get(stored.name))
        lost = {f"{n}.weight" for n in done} - sources.keys()
        if lost:
            raise ModelError(f"quantized weights without a source tensor: {sorted(lost)}")
        cache = self._cache(result)
        tensors |= cache
        account |= {name: TensorRecord("added", [name]) for name in cache}
        return tensors, account

    def _cache(self, result: BlockResult) -> dict[str, torch.Tensor]:
        """The scales of the KV cache by their names on disk: those of the attention they belong to."""
        places = skeleton.places(self.run.model)
        split = ((*name.rpartition("."), tensor) for name, tensor in result.cache.items())
        return {f"{places.on_disk(module)}.{leaf}": tensor for module, _, leaf, tensor in split}


def _whole_stacks(sources: Mapping[str, TensorInfo], quantized: Container[str]) -> set[str]:
    """Names of the stacks of experts of which no linear is quantized, so that they are written as they are."""
    stacks: dict[str, bool] = {}
    for name, info in sources.items():
        if info.expert is not None:
            used = name.rpartition(".")[0] in quantized
            stacks[info.parts[0].name] = stacks.get(info.parts[0].name, False) or used
    return {name for name, used in stacks.items() if not used}


def _one(places: Places, parameter: str) -> str:
    """The tensor on disk of a parameter that was changed; ModelError if it is made of several."""
    parts = places.by_parameter[parameter]
    if len(parts) != 1 or not parts[0].whole:
        raise ModelError(
            f"{parameter} is assembled from {', '.join(each.disk for each in parts)}; leave out transforms"
        )
    return parts[0].disk
