"""How fast this machine does the parts of a quantization: seconds per unit of work, measured once; without torch.

`python -m quantkit.bench.rates` measures them through the code that a run executes, `quantkit plan` does so by itself
the first time. Rates that depend on the width of a layer are measured at several, and what lies between is
interpolated.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.device import cpu_name
from quantkit.files import write_json

SCHEMA = "quantkit-rates/1"
# Name of a rate -> its unit.
UNITS = {
    "start": "a process: Python and its imports",
    "open": "a run: model class, tokenizer and text, until the first block",
    "hash": "a byte of which sha256 is taken",
    "read": "a byte of weights read",
    "write": "a byte written: digests, check of values, fsync",
    "pack": "a weight whose codes are packed",
    "verify": "a weight that is read back and multiplied",
    "linear": "a token times a weight (a multiply-add in fp32)",
    "cast": "a weight cast to fp32 for a chunk of tokens",
    "decode": "a weight decoded from its codes for a chunk of tokens",
    "scores": "a token times a key times a channel of the hidden states",
    "vector": "a token times a channel of the hidden states: norms, activations, residuals, copies",
    "call": "a block run on a chunk of tokens: what does not depend on how many there are",
    "hessian": "a token times K^2 of an input with K channels, K from 1 on",
    "drift": "the same for the covariance with the original model's inputs",
    "factor": "K^3 of a Hessian that is damped and factored",
    "columns": "N K^2 of a weight whose columns are rounded one after the other",
    "sweep": "N K^2 of one round of coordinate descent",
    "search": "a weight whose grid is searched by least squares",
    "round": "a weight rounded to the grid of its extremes",
    "solve": "a weight given to an algorithm, whatever its size",
    "logits": "a token times an entry of the vocabulary, compared between two models",
}


@dataclass(frozen=True)
class Rates:
    """cpu, threads: of the machine, and of the process that measured.

    seconds: rate -> width of the layer -> seconds per unit, see `UNITS`; width "1" of rates that do not depend on it.
    """

    cpu: str
    threads: int
    seconds: Mapping[str, Mapping[str, float]]

    def at(self, name: str, width: int | None = None) -> float:
        """Seconds per unit at a width: between the measured ones a power law, beyond them that of the nearest.

        width: left out for the rates that do not depend on it only.
        """
        known = sorted((int(key), value) for key, value in self.seconds[name].items())
        if width is None:
            assert [key for key, _ in known] == [1], f"{name} depends on the width of a layer"
            width = 1
        below = [each for each in known if each[0] <= width] or known[:1]
        above = [each for each in known if each[0] >= width] or known[-1:]
        (a, x), (b, y) = below[-1], above[0]
        if a >= b or x <= 0 or y <= 0:
            return x
        return float(x * (y / x) ** (math.log(width / a) / math.log(b / a)))

    def report(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | asdict(self)


def rates_file() -> Path:
    """Where they are kept: quantkit/rates.json in XDG_CACHE_HOME, or else in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "quantkit" / "rates.json"


def keep_rates(rates: Rates) -> Path:
    """Keep what was measured for `known_rates`; the file it is in."""
    file = rates_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, rates.report())
    return file


def known_rates() -> Rates | None:
    """What was measured of this machine; None if nothing was, the file is damaged, or it is of another processor."""
    try:
        found = json.loads(rates_file().read_text(encoding="utf-8"))
        rates = Rates(str(found["cpu"]), int(found["threads"]), found["seconds"])
        sound = found["schema"] == SCHEMA and all(rates.at(name, 1024) >= 0 for name in UNITS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return rates if sound and rates.cpu == cpu_name() else None


__all__ = ["SCHEMA", "UNITS", "Rates", "keep_rates", "known_rates", "rates_file"]
