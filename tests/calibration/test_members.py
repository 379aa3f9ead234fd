"""Which process of a run is lost, seen from another one; the others are played by a store that they write to."""

import subprocess
import sys
import time

import pytest
from torch.distributed import HashStore

from quantkit.calibration.members import Member, Members


@pytest.fixture
def store():
    return HashStore()


@pytest.fixture
def members(store):
    """Rank 0 of three; the other two seem to be on other machines."""
    others = [Member(rank, f"host-{rank}", 4711, f"elsewhere {rank}") for rank in (1, 2)]
    for other in others:
        store.set(f"beat/{other.rank}", "0")
    found = Members(store, [Member.here(0), *others], 0)
    yield found
    found.stop()


def test_all_are_well_as_far_as_is_known(members):
    assert members.lost() is None


def test_a_failure_is_told_with_its_reason(members, store):
    store.set("failed/2", "disk full")
    store.add("failures", 1)
    assert members.lost() == ("rank 2 (host-2, pid 4711) has failed: disk full", True)


def test_an_own_failure_is_in_the_store(members, store):
    members.failed("no memory")
    assert store.get("failed/0") == b"no memory"
    assert members.lost() is None  # it is no other process


def test_one_that_beats_no_more_is_dead(members, store):
    assert members.lost(silent=0.05) is None
    time.sleep(0.1)
    store.set("beat/1", "1")
    assert members.lost(silent=0.05) == (
        "rank 2 (host-2, pid 4711) has died, or its machine cannot be reached",
        True,
    )


def test_a_process_of_this_machine_is_known_to_be_gone_at_once(store):
    """Also while it waits to be looked after, as torchrun's do."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    other = Member.here(1)._replace(pid=child.pid)
    store.set("beat/1", "0")
    members = Members(store, [Member.here(0), other], 0)
    try:
        assert members.lost() is None
        child.kill()
        end = time.monotonic() + 10
        while members.lost() is None and time.monotonic() < end:
            time.sleep(0.01)
        assert members.lost() == (f"{other} has died", True)
        assert child.poll() is not None
        assert other.gone
    finally:
        members.stop()
        child.kill()
        child.communicate()


def test_that_the_first_process_is_dead_is_said_by_the_others(store):
    store.set("beat/0", "0")
    members = Members(store, [Member(0, "host-0", 1, "elsewhere"), Member.here(1)], 1)
    try:
        members.lost()
        time.sleep(0.05)
        assert members.lost(silent=0.01) == (
            "rank 0 (host-0, pid 1) has died, or its machine cannot be reached",
            False,
        )
    finally:
        members.stop()
