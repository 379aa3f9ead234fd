"""The processes of a run by name, and which of them has died, has failed or does not answer.

Every process writes a beat into a store that all of them see (torch.distributed's, hosted by torchrun or by the first
process), and an error that it fails with. So one that waits for others learns whom it waits for in vain. Of processes
on the same machine the system knows it at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

BEAT = 1.0  # seconds between two beats
SILENT = 60.0  # seconds without a beat after which a process counts as dead
CUT_OFF = 6.0  # the same, once the connection to some process has broken


class Member(NamedTuple):
    """One process. space: its machine and process namespace, in which `pid` means something."""

    rank: int
    host: str
    pid: int
    space: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @classmethod
    def here(cls, rank: int) -> Member:
        """This process."""
        host = socket.gethostname()
        with contextlib.suppress(OSError):
            return cls(rank, host, os.getpid(), f"{host} {os.readlink('/proc/self/ns/pid')}")
        return cls(rank, host, os.getpid(), host)

    @property
    def gone(self) -> bool:
        """Whether the process, which is one of this machine, has ended; it may still be in the table of processes."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            with contextlib.suppress(PermissionError):
                try:
                    os.kill(self.pid, 0)
                except ProcessLookupError:
                    return True
            return False
        return state in ("Z", "X", "x")


class Members:
    """All processes of a run, by rank. store: as of torch.distributed, with keys that only this run uses."""

    def __init__(self, store: Any, members: list[Member], rank: int) -> None:
        self.all, self.me = members, members[rank]
        self._others = [member for member in members if member.rank != rank]
        self._store = store
        self._ended = threading.Event()
        self._beats: dict[int, tuple[bytes, float]] = {}  # rank -> (last beat, when it was first seen here)
        store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._beat, name="quantkit beat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        number = 0
        while not self._ended.wait(BEAT):
            number += 1
            try:
                self._store.set(f"beat/{self.me.rank}", str(number))
            except RuntimeError:  # the store has gone with the process that held it
                return

    def stop(self) -> None:
        """No more beats."""
        self._ended.set()
        self._thread.join()

    def failed(self, message: str) -> None:
        """Tell the others that this process fails, and why."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"failed/{self.me.rank}", message)
            self._store.add("failures", 1)

    def lost(self, silent: float = SILENT) -> tuple[str, bool] | None:
        """(what is known of a process that will not come any more, whether the first process can say so).

        None if all are well as far as is known. silent: seconds without a beat that are taken for death.
        """
        try:
            if self._store.add("failures", 0):
                for member in self._others:
                    if self._store.check([f"failed/{member.rank}"]):
                        why = self._store.get(f"failed/{member.rank}").decode()
                        return f"{member} has failed: {why}", True
            for member in self._others:
                if member.space == self.me.space and member.gone:
                    return f"{member} has died", member.rank != 0
            return self._still(silent)
        except RuntimeError:
            return f"{self.all[0]} has died, or its machine cannot be reached", False

    def _still(self, silent: float) -> tuple[str, bool] | None:
        """A process whose beat has not changed for so long."""
        now = time.monotonic()
        for member in self._others:
            beat = self._store.get(f"beat/{member.rank}")
            if self._beats.get(member.rank, (b"", now))[0] != beat:
                self._beats[member.rank] = (beat, now)
            elif now - self._beats[member.rank][1] > silent:
                return f"{member} has died, or its machine cannot be reached", member.rank != 0
        return None
