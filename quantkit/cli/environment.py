"""Environment variables that the `quantkit` process sets before it imports torch or transformers.

A variable that the user has set is never changed.

**Threads.** OpenMP's threads wait for each other at a barrier after every parallel op. By default they spin for
milliseconds, which is fastest while each thread has a core of its own; when another job, a noisy neighbour or a
container's quota takes a core away, all threads burn their time slices waiting for the one that does not run.
`SPIN` bounds that wait, after which a thread sleeps until it is woken (`python -m quantkit.bench.models.waiting`
measures what this costs on an idle machine). The number of threads is also bounded by the CPU quota of the cgroup,
which neither OpenMP nor torch looks at.

**Quiet.** Progress bars of the Hugging Face libraries are switched off where standard error is no terminal, and
their loggers report errors only.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from quantkit.cli.quota import cpu_quota
from quantkit.device import SPIN, THREAD_SETTINGS, WAIT_SETTINGS

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def prepare(environment: MutableMapping[str, str], terminal: bool) -> None:
    """Set what the user has left open. terminal: whether standard error is one."""
    if not any(name in environment for name in WAIT_SETTINGS):
        environment.update(SPIN)
    if not any(name in environment for name in THREAD_SETTINGS):
        threads = threads_by_quota(cpu_quota(), usable_cpus())
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
    for name, value in (QUIET if terminal else QUIET | NO_BARS).items():
        environment.setdefault(name, value)


def usable_cpus() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_by_quota(quota: float | None, cpus: int) -> int | None:
    """Threads for a quota of so many processors' time, rounded up; None where the quota is no bound."""
    if quota is None or quota >= cpus:
        return None
    return max(1, -int(-quota // 1))
