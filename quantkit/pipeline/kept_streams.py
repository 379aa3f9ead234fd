"""The hidden states that a run goes on with after an interruption: every process keeps those of its own windows.

The journal, which the first process writes, has the digests of all. A process removes older ones only when the journal
is known to be past them.
"""

from __future__ import annotations

from io import RawIOBase

import torch
from safetensors.torch import load_file

from quantkit.calibration.spill import Spill, Spilled
from quantkit.calibration.streams import Rows, Streams
from quantkit.checkpoint.check import digest_file
from quantkit.checkpoint.shards import Entry, Streamed, write_shard
from quantkit.checkpoint.stream_files import StreamFiles
from quantkit.files import output_error
from quantkit.models.tensors import TensorInfo, read_header, stored_dtype, torch_dtype
from quantkit.pipeline.block import BlockResult
from quantkit.pipeline.run import Run

_LARGE = ("full", "quantized")  # of a file of hidden states
Digests = str | list[str] | None  # of one process, or of each of several


class KeptStreams:
    """Those of this process. All processes of a run make the same calls."""

    def __init__(self, run: Run, files: StreamFiles) -> None:
        self.run, self.files = run, files

    def there(self, done: int, digests: Digests) -> bool:
        """Whether every process has what it kept behind `done` parts; digests: as the journal has them."""
        ranks, path = self.run.ranks, self.files.at(done)
        own = digests[ranks.rank] if isinstance(digests, list) else digests
        return all(ranks.gather(path.is_file() and digest_file(path) == own))

    def load(self, done: int) -> Streams:
        """What was kept behind `done` parts."""
        spill = self.run.thrift.spill
        if spill is not None:
            infos = read_header(self.files.at(done)).items()
            return Streams.from_tensors({k: _rows(i, spill) if k in _LARGE else _tensor(i) for k, i in infos})
        # clones: mapped pages count as resident and are not aligned, which may change a matmul's last bit
        return Streams.from_tensors({k: t.clone() for k, t in load_file(self.files.at(done)).items()})

    def keep(self, part: int, streams: Streams | None) -> Digests:
        """Write the hidden states behind a part, if the run needs them to go on there; for the journal."""
        if streams is None or not self.run.needs_streams(part + 1):
            return None
        with self.run.clock("write"):
            try:
                self.files.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise output_error(self.files.folder, error) from error
            entries = {name: _entry(rows) for name, rows in streams.to_tensors().items()}
            digest = write_shard(self.files.at(part + 1), entries).sha256
            return self.run.ranks.gather(digest) if self.run.ranks.size > 1 else digest


def _entry(rows: Rows) -> Entry:
    """What `write_shard` takes: a tensor, or one that is read from its file in pieces."""
    if isinstance(rows, torch.Tensor):
        return rows
    return Streamed(
        stored_dtype(rows.dtype), tuple(rows.shape), lambda: (rows[each] for each in rows.pieces())
    )


def _rows(info: TensorInfo, spill: Spill) -> Spilled:
    """A kept tensor in a file of its own again, which the run writes to."""
    found = spill.empty(*info.shape, dtype=torch_dtype(info.dtype))
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.offset)
        for rows in found.pieces():
            found[rows] = _read(file, found.dtype, (rows.stop - rows.start, *info.shape[1:]))
    return found


def _tensor(info: TensorInfo) -> torch.Tensor:
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.offset)
        return _read(file, torch_dtype(info.dtype), info.shape)


def _read(file: RawIOBase, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The next tensor of a file whose digest is known to be right."""
    found = torch.empty(shape, dtype=dtype)
    view = found.view(-1).view(torch.uint8).numpy().data
    while len(view):
        view = view[file.readinto(view) :]
    return found


class Follower:
    """What a process other than the first keeps of a run: its hidden states. The first one writes everything else."""

    def __init__(self, run: Run) -> None:
        self.run, self.journal = run, Nothing()
        self._streams = KeptStreams(run, StreamFiles(run.output, run.ranks.rank))

    def finished(self) -> int:
        done, digests = self.run.ranks.first((0, None))
        if digests is None or self._streams.there(done, digests):
            return done
        return 0

    def streams(self, done: int) -> Streams | None:
        return self._streams.load(done) if done else None

    def put_aside(self, part: int, result: BlockResult) -> None:
        result.weights.clear()  # the first process writes them

    def commit(self, part: int, result: BlockResult, streams: Streams | None = None) -> None:
        if self._streams.keep(part, streams):
            self._streams.files.drop(part, part + 1)  # the journal may still be at `part`

    def leave(self) -> None:
        """The checkpoint is finished."""
        self._streams.files.leave()


class Nothing:
    """A journal that keeps nothing."""

    def kept(self) -> None:
        return None

    def keep(self, found: object) -> None:
        pass
