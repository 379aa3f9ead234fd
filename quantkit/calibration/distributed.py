"""`Ranks` over torch.distributed: a run that torchrun has started in several processes.

Gloo carries what is on the CPU, NCCL what is on GPUs. Nothing waits without looking after the others: a process that
has died or failed ends the waiting with its name.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

from quantkit.calibration.members import CUT_OFF, Member, Members
from quantkit.calibration.ranks import ALONE, Ranks
from quantkit.device import Launch, find_device, launch
from quantkit.errors import ModelError, ProcessLost, why

T = TypeVar("T")
START = 600.0  # seconds in which all processes must have started
PATIENCE = timedelta(hours=24)  # a process that beats may work for so long before it comes
LOOK = 1.0  # seconds between two looks after the others
LONGEST_PAUSE = 0.002  # seconds between two looks at a transfer
_joins = 0  # how often this process has joined others: each time has names of its own in the store
_kept: list[Any] = []  # the store, which the first process may hold for all


class Processes(Ranks):
    """This process among those of one run. advice: what to do when one of them is lost."""

    def __init__(self, members: Members, advice: str) -> None:
        self.members, self.advice = members, advice
        self.rank, self.size = members.me.rank, len(members.all)

    def sum(self, tensor: torch.Tensor) -> None:
        self._reduce(tensor, torch.distributed.ReduceOp.SUM)

    def max(self, tensor: torch.Tensor) -> None:
        self._reduce(tensor, torch.distributed.ReduceOp.MAX)

    def min(self, tensor: torch.Tensor) -> None:
        self._reduce(tensor, torch.distributed.ReduceOp.MIN)

    def gather(self, value: T) -> list[T]:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        own = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._gather(lengths, torch.tensor([len(own)]))
        most = int(max(lengths))
        parts = [torch.empty(most, dtype=torch.uint8) for _ in range(self.size)]
        self._gather(parts, torch.nn.functional.pad(own, (0, most - len(own))))
        # what the processes of one run tell each other is no file: it may hold any of our types
        return [
            value if rank == self.rank else _opened(part[: int(length)])
            for rank, (part, length) in enumerate(zip(parts, lengths, strict=True))
        ]

    def _reduce(self, tensor: torch.Tensor, how: Any) -> None:
        self._done(lambda: torch.distributed.all_reduce(tensor, how, async_op=True))

    def _gather(self, parts: list[torch.Tensor], own: torch.Tensor) -> None:
        self._done(lambda: torch.distributed.all_gather(parts, own, async_op=True))

    def _done(self, begin: Any) -> None:
        """Begin a transfer and wait for it; ProcessLost if it cannot come to its end."""
        try:
            work = begin()
            pause, look = 1e-5, time.monotonic() + LOOK
            while not work.is_completed():
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                if time.monotonic() > look:
                    self.check()
                    look = time.monotonic() + LOOK
            work.wait()
        except RuntimeError as error:
            raise self._broken(error) from error

    def failed(self, message: str) -> None:
        self.members.failed(message)

    def check(self) -> None:
        """ProcessLost if another process is known to be lost."""
        if found := self.members.lost():
            raise self._lost(*found)

    def _broken(self, error: RuntimeError) -> ProcessLost:
        """Who it was, after a transfer has failed."""
        end = time.monotonic() + 2 * CUT_OFF
        while time.monotonic() < end:
            if found := self.members.lost(CUT_OFF):
                return self._lost(*found)
            time.sleep(0.05)
        said = " ".join(str(error).split())[:200]
        others = ", ".join(str(each) for each in self.members.all if each != self.members.me)
        return ProcessLost(f"the connection to {others} has broken: {said}; {self.advice}", told=False)

    def _lost(self, what: str, told: bool) -> ProcessLost:
        return ProcessLost(f"{what}; {self.advice}", told)


def _opened(part: torch.Tensor) -> Any:
    return torch.load(io.BytesIO(part.numpy().tobytes()), map_location="cpu", weights_only=False)


@contextmanager
def joined(device: str, advice: str) -> Iterator[Ranks]:
    """Inside, the processes that torchrun has started work together; a process that was started alone is `ALONE`.

    device: where this process computes, as of `find_device`. advice: what to do when a process is lost. An error that
    leaves the block ends the other processes too, with this one's name and the error's message. ProcessLost if not all
    processes come.
    """
    place = launch()
    if place.size == 1:
        yield ALONE
        return
    store = _store(place)
    try:
        where = find_device(device)
        store.set(f"here/{place.rank}", json.dumps(Member.here(place.rank)))
        members = Members(store, _meeting(store, place), place.rank)
    except BaseException as error:
        store.set(f"absent/{place.rank}", _told(error))
        raise
    ranks = Processes(members, advice)
    own = not torch.distributed.is_initialized()
    try:
        with _told_to_end(ranks):
            if own:
                _connect(store, place, where)
            yield ranks
    except BaseException as error:
        members.failed(_told(error))
        raise
    finally:
        members.stop()
        if own and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _told(error: BaseException) -> str:
    """What the others are told of an error; they say it, so this process need not."""
    said = why(error)
    if not isinstance(error, ProcessLost):
        vars(error)["told"] = True
    return said


def _connect(store: Any, place: Launch, device: torch.device) -> None:
    """Open the connections for tensors."""
    backend = "gloo"
    if device.type == "cuda" and torch.distributed.is_nccl_available():
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.size, timeout=PATIENCE
    )


def _store(place: Launch) -> Any:
    """The store that torchrun's processes share, with keys of this joining alone."""
    global _joins
    if not torch.distributed.is_available():
        raise ModelError("this build of torch has no torch.distributed; start one process")
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        if not _kept:
            meeting = rendezvous("env://", timeout=timedelta(seconds=START))
            _kept.append(next(meeting)[0])
    except (RuntimeError, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ProcessLost(
            f"{Member.here(place.rank)} of {place.size} processes does not reach the others at {where}: {said}; "
            "check the address and port given to torchrun, the firewall, and that every machine was started",
            told=False,
        ) from error
    _joins += 1
    return PrefixStore(f"quantkit/{_joins}", _kept[0])


def _meeting(store: Any, place: Launch) -> list[Member]:
    """All processes, once they have come."""
    end = time.monotonic() + START
    missing = set(range(place.size))
    while missing := {rank for rank in missing if not store.check([f"here/{rank}"])}:
        for rank in missing:
            if store.check([f"absent/{rank}"]):
                raise ProcessLost(
                    f"rank {rank} has failed: {store.get(f'absent/{rank}').decode()}", rank != 0
                )
        if time.monotonic() > end:
            raise ProcessLost(
                f"rank {', '.join(map(str, sorted(missing)))} of {place.size} processes has not come for {START:g} "
                "seconds; check that torchrun was started on every machine, for as many machines and processes",
                told=False,
            )
        time.sleep(0.02)
    return [Member(*json.loads(store.get(f"here/{rank}"))) for rank in range(place.size)]


@contextmanager
def _told_to_end(ranks: Processes) -> Iterator[None]:
    """SIGTERM, by which torchrun ends the others when a process has died, is answered with the name of that process."""

    def answer(number: int, frame: Any) -> None:
        with contextlib.suppress(RuntimeError):
            ranks.check()
        signal.signal(signal.SIGTERM, before)
        os.kill(os.getpid(), signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
