"""What is built, what the machine has, and which backend each scheme gets. Times nothing."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
from typing import Any

import quantkit_kernels
import torch
from quantkit_kernels.backends import ENVIRONMENT

BITS = range(2, 9)
GROUPS: tuple[int | None, ...] = (32, 64, 128, None)
NOT_BUILT = "not built: PyTorch's ops or the reference run"


def inventory(n: int, k: int, m: int, backend: str | None = None) -> dict[str, Any]:
    """{"built": {part: what there is}, "schemes": [...]}, for a weight [N, K] and M tokens per call."""
    return {"schema": "quantkit-inventory/1", "built": built(), "schemes": schemes(n, k, m, backend)}


def built() -> dict[str, str]:
    """Each part in one line."""
    forced = os.environ.get(ENVIRONMENT)
    return {
        "native CPU library": native(),
        "Triton": _triton(),
        "CUDA": _cuda(),
        "PyTorch": f"{torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}",
        "backends": ", ".join(quantkit_kernels.backends()) + (f" ({ENVIRONMENT}={forced})" if forced else ""),
    }


def native() -> str:
    """The native CPU library: the path that runs, those this machine could run, those it lacks."""
    try:
        from quantkit_kernels.cpu import library
    except ImportError:
        return NOT_BUILT
    if not library.available():
        return NOT_BUILT
    try:
        running = library.isa()
    except RuntimeError as error:
        return f"built, but {error}"
    return describe_native(library.load(), running)


def describe_native(library: ctypes.CDLL, running: str) -> str:
    """The same of a loaded library, `running` being the path in use."""
    names = {isa: library.qk_isa_name(isa).decode() for isa in range(4)}
    can = [name for isa, name in names.items() if library.qk_isa_available(isa) > 0]
    lacks = [name for name in names.values() if name not in can]
    forced = os.environ.get("QUANTKIT_ISA")
    return (
        f"built; runs {running}{f' (QUANTKIT_ISA={forced})' if forced else ''}; possible here: {', '.join(can)}"
        + (f"; built, but not for this machine: {', '.join(lacks)}" if lacks else "")
        + f"; processor: {library.qk_cpu_flags().decode()}"
    )


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    return importlib.metadata.version("triton")


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device"
    devices = range(torch.cuda.device_count())
    return ", ".join(
        "{} (sm_{}{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in devices
    )


def schemes(n: int, k: int, m: int, backend: str | None = None) -> list[dict[str, Any]]:
    """What `quantkit_kernels.select` says, schemes with the same answer in one row.

    Row: device, bits [..], groups [..], zero_point, runs (None if nothing can), why. A device that is not here
    is answered all the same: the answer is what would run there.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for device in ("cpu", "cuda"):
        for bits in BITS:
            answers = {
                (group, symmetric): _ask(device, bits, group or k, symmetric, m, n, k, backend)
                for group in GROUPS
                for symmetric in (True, False)
                if not k % (group or k)
            }
            for group in GROUPS:
                if (group, True) not in answers:
                    continue
                both = answers[group, True], answers[group, False]
                kinds = {"any": both[0]} if both[0] == both[1] else {"none": both[0], "stored": both[1]}
                for kind, (runs, why) in kinds.items():
                    row = rows.setdefault(
                        (device, bits, kind, runs, why),
                        {"device": device, "bits": [bits], "groups": [], "zero_point": kind, "runs": runs}
                        | {"why": why},
                    )
                    row["groups"].append(str(group or "channel"))
    merged: dict[tuple, dict[str, Any]] = {}
    for row in rows.values():
        key = (row["device"], *row["groups"], row["zero_point"], row["runs"], row["why"])
        if key in merged:
            merged[key]["bits"] += row["bits"]
        else:
            merged[key] = row
    return list(merged.values())


def _ask(
    device: str, bits: int, group: int, symmetric: bool, m: int, n: int, k: int, backend: str | None
) -> tuple[str | None, str]:
    try:
        return tuple(quantkit_kernels.select(device, bits, group, symmetric, m, n, k, backend))
    except quantkit_kernels.BackendMissing as error:
        return None, str(error)
