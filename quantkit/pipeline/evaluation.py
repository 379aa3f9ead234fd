"""Original and quantized model side by side on the embedded text, the packed weights running."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import quantkit_eval
import torch

from quantkit import assets
from quantkit.checkpoint.load import load
from quantkit.models.headers import Headers

TOKENS = 65536
CONTEXT = 2048  # at most; the recipe's calibration length says what the model is used for
_WORKING_SPACE = 1.3  # beside the fp32 weights of the original


def evaluate_pair(
    output: Path, headers: Headers, tokenizer: Any, device: torch.device, sequence_length: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """(report of schema "quantkit-eval/1", []) or (None, [why not]) when the original does not fit into memory.

    The context is the calibration length, as far as the model takes it.
    """
    needed = 4 * _WORKING_SPACE * sum(math.prod(t.shape) for t in headers.tensors.values())
    if device.type == "cpu" and needed > _available():
        return None, [
            f"not evaluated: the original in fp32 needs {needed / 2**30:.1f} GiB, more than this machine has free; "
            "run `quantkit eval` where it fits"
        ]
    original = load(headers.path, device=device)
    longest = getattr(original.config.get_text_config(), "max_position_embeddings", None) or CONTEXT
    report = quantkit_eval.evaluate(
        load(output, device=device),
        tokenizer,
        text=[str(assets.evaluation_text())],
        baseline=original,
        max_tokens=TOKENS,
        context=min(sequence_length, longest, CONTEXT),
    )
    return report.to_json(), []


def _available() -> float:
    """Bytes that can be used without swapping; unlimited where the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else math.inf
