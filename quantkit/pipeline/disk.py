"""Is there room for the output, before anything is computed?"""

from __future__ import annotations

import shutil
from pathlib import Path

from quantkit.errors import OutputError


def check_disk(output: Path, needed: int) -> None:
    """OutputError unless `needed` bytes fit where `output` is or will be; what lies in the folder counts as free.

    Where the system does not say what is free, nothing is refused.
    """
    place = next((p for p in (output, *output.absolute().parents) if p.is_dir()), Path("/"))
    try:
        free = shutil.disk_usage(place).free
        there = sum(f.stat().st_size for f in output.rglob("*") if f.is_file()) if output.is_dir() else 0
    except OSError:
        return
    if needed > free + there:
        raise OutputError(
            f"{output} needs about {needed / 1e9:.2f} GB of disk (the checkpoint, and what a resumed run needs), "
            f"{free / 1e9:.2f} GB are free there; free some, or choose another --output"
        )
