"""The hidden states that a run goes on with after an interruption: every process keeps those of its own windows.

The journal, which the first process writes, has the digests of all. A process removes older ones only when the journal
is known to be past them.
"""

from __future__ import annotations

from safetensors.torch import load_file

from quantkit.calibration.streams import Streams
from quantkit.checkpoint.check import digest_file
from quantkit.checkpoint.shards import write_shard
from quantkit.checkpoint.stream_files import StreamFiles
from quantkit.files import output_error
from quantkit.pipeline.block import BlockResult
from quantkit.pipeline.run import Run

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
            digest = write_shard(self.files.at(part + 1), streams.to_tensors()).sha256
            return self.run.ranks.gather(digest) if self.run.ranks.size > 1 else digest


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
