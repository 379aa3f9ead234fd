"""Memory that a process of its own takes to load a model and to generate with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantkit.bench.models.subject import Opening, open_subject
from quantkit.errors import RunError

ANONYMOUS = "anonymous memory of a process of its own, beyond what imports take"
ALLOCATED = "memory that torch allocated on the device, in a process of its own"


def footprint(opening: Opening, batch: int, context: int, prompt: int, new: int) -> dict[str, Any]:
    """Peaks in bytes while a fresh process loads the model, and after that generates for `batch` sequences.

    {"load_peak_bytes", "peak_bytes" (the larger of both), "mapped_bytes" (of files, at the end), "what"}. RunError if
    that process fails.
    """
    asked = {"opening": asdict(opening), "cell": [batch, context, prompt, new]}
    done = subprocess.run(
        [sys.executable, "-m", "quantkit.bench.models.footprint", json.dumps(asked)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"the process that measures the memory of {opening.path} failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(opening: Opening, batch: int, context: int, prompt: int, new: int) -> dict[str, Any]:
    import torch
    import transformers  # noqa: F401  part of what imports take

    import quantkit.checkpoint.load  # noqa: F401
    from quantkit.bench.models.decode import anonymous, peak
    from quantkit.bench.models.lanes import make_lane, measure

    imports, mapped = anonymous(), _mapped()
    with peak() as loading:
        subject = open_subject(opening)
    with peak() as running:
        vocabulary = subject.model.config.get_text_config(decoder=True).vocab_size
        tokens = torch.randint(0, vocabulary, (batch, context + prompt))
        measure(make_lane(subject.runner(batch, new), tokens, context), new)
    if subject.model.device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(subject.model.device)
        return {"peak_bytes": allocated, "load_peak_bytes": None, "mapped_bytes": None, "what": ALLOCATED}
    return {
        "peak_bytes": max(loading[0], running[0]) - imports,
        "load_peak_bytes": loading[0] - imports,
        "mapped_bytes": max(0, _mapped() - mapped),
        "what": ANONYMOUS,
    }


def _mapped() -> int:
    """RssFile of this process in bytes."""
    found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(_measure(Opening(**asked["opening"]), *asked["cell"])))
