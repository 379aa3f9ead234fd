"""The machine's processors: which device a name asks for, what the CPU is called, how OpenMP's threads wait, and which
of several processes this is.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from quantkit.errors import ModelError

if TYPE_CHECKING:
    import torch

# Settings of OpenMP: how long a thread spins at a barrier before it sleeps, and how many threads there are.
SPIN = {
    "GOMP_SPINCOUNT": "100000",  # GNU's runtime, of torch's Linux wheels and our native library: rounds of a loop
    "KMP_BLOCKTIME": "0",  # LLVM's and Intel's runtimes: milliseconds
}
WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")


class Launch(NamedTuple):
    """Which of `size` processes of one run this is, counted from 0, and which of the `beside` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    beside: int = 1


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """What torchrun has written into the environment; a process that was started alone is the first of one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local, beside = (environment.get(name, "") for name in names)
    if not (rank.isdecimal() and size.isdecimal() and int(size) > 1 and "MASTER_ADDR" in environment):
        return Launch()
    return Launch(
        int(rank),
        int(size),
        int(local) if local.isdecimal() else int(rank),
        int(beside) if beside.isdecimal() else int(size),
    )


def find_device(wanted: str | torch.device | None, present: bool = True) -> torch.device:
    """The device that `wanted` names.

    wanted: "auto" or None (CUDA if there is a GPU, else the CPU), "cpu", "cuda", "cuda:1", or another device type
    that torch supports. Of several processes on one machine, each gets a GPU of its own for "auto" and "cuda".
    present: the device must be usable on this machine; False only reads the name.
    Raises ModelError for a name that torch does not know and for a device that this machine does not have.
    """
    import torch

    several = launch().size > 1 and present
    if wanted is None or str(wanted) == "auto":
        wanted = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not several:
            return wanted
    if several and str(wanted) == "cuda":
        wanted = f"cuda:{launch().local}"
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError, ValueError):
        raise ModelError(f"{wanted!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if not present:
        return device
    count = _count(device.type)
    if (device.index or 0) >= count:
        raise ModelError(
            f"device {device} is not available: this machine has {count} {device.type} devices; use auto or cpu"
        )
    return device


def _count(kind: str) -> int:
    """Number of usable devices of a type; 0 for types that this build of torch cannot compute on."""
    import torch

    try:
        module = torch.get_device_module(kind)
        return int(module.device_count()) if module.is_available() else 0
    except (RuntimeError, AttributeError, AssertionError):
        return 0


def cpu_name() -> str:
    """Model name of the processor, with its family and model numbers (many cloud machines say only "AMD EPYC")."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    if "model name" not in facts:  # not Linux, or ARM
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def peak_memory() -> int:
    """Bytes of resident memory that this process has had at most: its own, where the system says, not its parent's."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
