"""Does a finished checkpoint follow from its recorded inputs? Some of its blocks are made again and compared.

The run is that of `quantize`, up to the last block that is asked for: the walk, with the recipe, text and source that
`quantkit.json` has the digests of. Blocks between are not solved again but get their stored weights (`replayed.py`), so
each block is made behind the ones it was made behind. What a whole-model search has found is taken from the record.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.streams import Streams
from quantkit.calibration.walk import walk
from quantkit.checkpoint.check import damage
from quantkit.checkpoint.compare import Difference, differences
from quantkit.checkpoint.journal import Journal
from quantkit.checkpoint.manifest import MANIFEST, RUN, read_facts, read_manifest
from quantkit.checkpoint.records import FileRecord, Manifest, RunFacts, plain
from quantkit.errors import ModelError, UserError, memory_named
from quantkit.models.borders import quiet
from quantkit.models.digests import digests
from quantkit.models.tensors import TensorInfo, read_header, read_tensors
from quantkit.pipeline.block import BlockResult
from quantkit.pipeline.diff import leaves
from quantkit.pipeline.model_free import stream_part
from quantkit.pipeline.produce import full_precision, outside, without_text, worked_on
from quantkit.pipeline.progress import Progress, Silent
from quantkit.pipeline.publish import host, source_digest, versions
from quantkit.pipeline.quantize import prepared
from quantkit.pipeline.replayed import StoredLinears, replayed
from quantkit.pipeline.run import Run
from quantkit.pipeline.search import settled
from quantkit.pipeline.shard_writer import ShardWriter

SCHEMA = "quantkit-verify/1"
ADVICE = "quantkit verify makes again what quantkit quantize made"
OUTSIDE = "outside the blocks"


@dataclass(frozen=True)
class Part:
    """A part of the checkpoint, a decoder block or what is outside of them, that was made again.

    tensors: how many it has. differences: the tensors that came out otherwise, by name. recorded, found: sha256 of its
    file, as `quantkit.json` has it (None if the tensors lie in other files now) and of the one made now.
    """

    name: str
    tensors: int
    differences: list[Difference]
    recorded: str | None
    found: str
    seconds: float


@dataclass(frozen=True)
class Change:
    """Something about a run that is recorded, then and now; None: not recorded, or not there."""

    name: str
    then: Any
    now: Any


@dataclass(frozen=True)
class Reproduction:
    """What a comparison of a checkpoint with its record gave.

    files: how many were compared with their sha256. changed: those that have another one, or are missing, and which
    tensors of them, in words. inputs: recipe, source or text, where they are not the recorded ones; then, and if weight
    files have changed, no part was made again. environment: code, machine and settings that may change last bits, where
    they are not as they were, and keys of the recipe that there were none of. blocks: of the model.
    """

    path: str
    model: str
    files: int
    changed: list[str]
    inputs: list[Change]
    environment: list[Change]
    blocks: int
    parts: list[Part]

    @property
    def identical(self) -> bool:
        """Whether everything that was looked at is as recorded."""
        return not (self.changed or self.inputs or any(part.differences for part in self.parts))

    def to_json(self) -> dict[str, Any]:
        """Plain data, schema "quantkit-verify/1" (docs/reproducing.md)."""
        values: dict[str, Any] = plain(vars(self))
        return {"schema": SCHEMA, "identical": self.identical} | values


@memory_named()
@quiet(bars=False)
def reproduce(
    path: str | Path,
    layers: int | str = 3,
    model: str | Path | None = None,
    data: Sequence[str | Path] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> Reproduction:
    """Check the files of the checkpoint in folder `path`, and make some of its parts again from the recorded inputs.

    layers: how many decoder blocks, evenly spaced from the first to the last; or a glob, which chooses the blocks, and
    what is outside of them, with a tensor or module that it fits ("*": everything). model: the source; default: where
    the run read it. data: the calibration texts, in the recipe's order; default as before. threads: default as many as
    the run had. progress: who is told.

    ModelError or another UserError if there is nothing to compare with, or an input cannot be read. The result says
    what is different; nothing in `path` is changed.
    """
    folder, progress = Path(path), progress or Silent()
    if not (folder / MANIFEST).is_file():
        raise ModelError(f"{folder} has no {MANIFEST}, so nothing says how it was made; {ADVICE}")
    manifest = read_manifest(folder, ModelError, ADVICE)
    facts = read_facts(folder) if (folder / RUN).is_file() else RunFacts()
    changed = _changed(folder, manifest)
    with _threads(threads if threads is not None else facts.threads):
        run = _prepared(folder, manifest, facts, model, data, progress)
        parts = _chosen(run, layers)
        inputs = _inputs(manifest, run)
        result = Reproduction(
            path=str(folder),
            model=str(run.source.path),
            files=len(manifest.files),
            changed=[name + where for name, where in changed.items()],
            inputs=inputs,
            environment=_environment(manifest, facts, run),
            blocks=run.plan.n_blocks,
            parts=[],
        )
        if not inputs and not any(name.endswith((".safetensors", ".index.json")) for name in changed):
            made = _Again(run, folder, manifest).parts(parts)
            result = replace(result, parts=list(made))
    progress.finish()
    return result


def _changed(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Files that are not as recorded -> what is known about it, in words."""
    there = [name for name in manifest.files if (folder / name).is_file()]
    found = dict(zip(there, digests([folder / name for name in there]), strict=True))
    return {
        name: damage(folder / name, entry) if name in found else " (missing)"
        for name, entry in manifest.files.items()
        if found.get(name) != entry.sha256
    }


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Inside, torch and the native kernels use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepared(
    folder: Path,
    manifest: Manifest,
    facts: RunFacts,
    model: str | Path | None,
    data: Sequence[str | Path],
    progress: Progress,
) -> Run:
    """The recorded run, with its inputs read."""
    if manifest.recipe is None:
        raise ModelError(f"{folder / MANIFEST} has no recipe, so nothing can be made again; {ADVICE}")
    recipe = copy.deepcopy(manifest.recipe)
    where = str(model) if model is not None else facts.inputs.model if facts.inputs else None
    if where is None:
        raise UserError(
            f"{folder} does not say where its source lies ({RUN} is missing or older); name it with --model"
        )
    sources = recipe["calibration"]["data"]
    places = [str(each) for each in data] or (facts.inputs.data if facts.inputs else [])
    if sources and len(places) != len(sources):
        named = ", ".join(str(source["source"]) for source in sources)
        raise UserError(
            f"the recipe has {len(sources)} calibration texts ({named}), got {len(places)}; name each with --data, in "
            "this order"
        )
    for source, place in zip(sources, places, strict=False):
        source["source"] = place
    device = str(manifest.identity.get("device") or "auto")
    return prepared(recipe, where, folder, (), device, None, progress)


def _inputs(manifest: Manifest, run: Run) -> list[Change]:
    """Inputs that are not the recorded ones. A key that a recipe did not have yet is not one, see `_environment`."""
    then, now = (dict(leaves(each["recipe"])) for each in (manifest.identity, run.identity))
    found = [Change(f"recipe: {key}", was, now.get(key)) for key, was in then.items() if now.get(key) != was]
    for key in ("model", "data"):
        was, value = manifest.identity.get(key), run.identity.get(key)
        found += [Change(key, was, value)] if was != value else []
    kept = manifest.identity.get("statistics")  # "kept": of the same text, so nothing else was looked at
    return found if kept in (None, "kept") else [*found, Change("statistics", kept, None)]


def _environment(manifest: Manifest, facts: RunFacts, run: Run) -> list[Change]:
    """What is not as it was and may change last bits."""
    then: dict[str, Any] = {"quantkit": manifest.identity.get("code")}
    now: dict[str, Any] = {"quantkit": run.identity["code"]}
    then["sources of quantkit"] = manifest.code.source if manifest.code else None
    now["sources of quantkit"] = source_digest()
    for known, current in ((facts.versions, versions()), (facts.host, host())):
        for name, value in current.items():
            then[name], now[name] = (known or {}).get(name), value
    then["threads"], now["threads"] = facts.threads, torch.get_num_threads()
    then["processes"], now["processes"] = manifest.identity.get("processes", 1), 1
    then["device"], now["device"] = manifest.identity.get("device"), run.identity["device"]
    asked = dict(leaves(manifest.identity["recipe"]))
    now |= {f"recipe: {key}": value for key, value in leaves(run.identity["recipe"]) if key not in asked}
    then |= {key: then.get(key) for key in now}
    return [Change(name, then[name], value) for name, value in now.items() if then[name] != value]


def _chosen(run: Run, layers: int | str) -> list[int]:
    """Numbers of the parts that are made again, in order; UserError if a glob fits none."""
    blocks = run.plan.n_blocks
    if isinstance(layers, int):
        if layers < 1:
            raise UserError(f"layers must be at least 1 or a glob, got {layers}")
        count = min(layers, blocks)
        return sorted({round(number * (blocks - 1) / max(1, count - 1)) for number in range(count)})
    found = [
        part
        for part, tensors in enumerate(run.parts)
        if any(fnmatchcase(each, layers) for name in tensors for each in (name, name.rpartition(".")[0]))
        or (part < blocks and fnmatchcase(f"{run.plan.blocks_prefix}.{part}", layers))
    ]
    if not found:
        some = next(name for name in run.parts[0])
        raise UserError(f"no tensor of {run.source.path} fits {layers!r}; names are like {some}")
    return found


class _Again:
    """Makes parts of a run again, in a temporary folder, and compares them with those in `folder`."""

    def __init__(self, run: Run, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.run = run
        self.old = read_tensors(folder)[1]
        self.found: list[Part] = []
        self.began = run.clock.now()

    def parts(self, parts: Sequence[int]) -> list[Part]:
        """Make these parts; what became of each."""
        run = self.run
        run.progress.start(len(parts), f"{run.source.headers.name} again")
        with tempfile.TemporaryDirectory(prefix="quantkit-verify-") as place, full_precision():
            self.run = run = replace(run, output=Path(place) / "again")
            journal = Journal(run.output, run.identity, resume=False)
            try:
                self._make(ShardWriter(run, journal), parts)
            finally:
                journal.close()
        return self.found

    def _make(self, writer: ShardWriter, parts: Sequence[int]) -> None:
        run, total = self.run, self.run.plan.n_blocks
        if run.skeleton is None or run.windows is None:
            for part in parts:
                if run.skeleton is None:
                    stream_part(run, writer, part)
                else:
                    writer.commit(part, without_text(run, part))
                self._compare(part, writer)
            return
        streams = None
        if parts[0] < total or run.plans(total):
            streams = self._walk(writer, parts)
        if total in parts:
            writer.commit(total, BlockResult() if streams is None else outside(run, streams))
            self._compare(total, writer)

    def _walk(self, writer: ShardWriter, parts: Sequence[int]) -> Streams | None:
        """Go through the blocks up to the last one that is needed; the hidden states behind the last block."""
        run, total = self.run, self.run.plan.n_blocks
        assert run.windows is not None
        transforms = settled(run, list(self.manifest.searches or []))
        given = partial(replayed, StoredLinears(self.folder, writer.codec))
        last = total - 1 if total in parts and run.plans(total) else max(p for p in parts if p < total)
        streams = None
        for block in walk(
            run.model,
            run.source,
            run.plan,
            run.windows.ids,
            run.wanted,
            device=run.device,
            timed=run.clock,
            now=run.clock.now,
            thrift=run.thrift,
        ):
            wanted = block.index in parts
            if wanted:
                result = worked_on(run, block, transforms, writer.put_aside)
            else:
                worked_on(run, block, transforms, lambda part, nothing: None, given)
            block.last = block.last or (block.index == last and last < total - 1)
            block.leave()
            streams = block.streams
            if wanted:
                writer.commit(block.index, result)
                self._compare(block.index, writer)
            else:
                run.progress.message(f"{block.name}: stored weights")
            if block.index == last:
                break
        return streams

    def _compare(self, part: int, writer: ShardWriter) -> None:
        """Compare a shard that was just written with the stored tensors, and remove it."""
        run, written = self.run, writer.journal.entries[-1]["written"]
        file = run.output / written["file"]
        recorded = self.manifest.files.get(file.name)
        apart: list[Difference] = []
        if recorded is None or recorded.sha256 != written["sha256"]:
            new = read_header(file)
            old = self._old(recorded, new)
            schemes = {layer.name: layer.scheme for layer in run.plan.layers}
            apart = list(differences(old, new, writer.codec, schemes.get))
        name = f"{run.plan.blocks_prefix}.{part}" if part < run.plan.n_blocks else OUTSIDE
        digest = recorded.sha256 if recorded else None
        seconds, self.began = run.clock.now() - self.began, run.clock.now()
        self.found.append(Part(name, len(written["tensors"]), apart, digest, written["sha256"], seconds))
        file.unlink()
        run.progress.block(len(self.found) - 1, name, "identical" if not apart else "different")

    def _old(self, recorded: FileRecord | None, new: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The stored tensors of a part: those of its file, or of the new names where the files were saved again."""
        names = new.keys() if recorded is None else (recorded.tensors or new).keys()
        return {name: self.old[name] for name in names if name in self.old}
