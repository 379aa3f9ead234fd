"""The facts about machine and versions that every benchmark reports."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantkit.device import cpu_name


def machine() -> dict[str, Any]:
    """CPU, cores, versions, commit and date, for the head of a benchmark's JSON."""
    import torch
    import transformers

    return {
        "cpu": cpu_name(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Short commit of the checkout, with a + when it has changes; "unknown" outside of one."""
    here = Path(__file__).resolve().parent
    try:
        name = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip()


def native_available() -> bool:
    """Whether the native CPU library is built and loads."""
    try:
        from quantkit_kernels.cpu.library import available
    except ImportError:
        return False
    return available()


def where(device: str) -> dict[str, Any]:
    """The instruction set path in use, for the head of the JSON."""
    import torch

    facts: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "isa": None}
    if device != "cpu":
        return facts | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    if native_available():
        from quantkit_kernels.cpu.library import isa

        facts["isa"] = isa()
    return facts
