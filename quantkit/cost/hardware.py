"""What a device can do: bytes read per second and operations per second, by the kind of number; without torch.

`hardware.json` holds published figures, each with its source; `auto` is this machine, as the command
`python -m quantkit.bench.roofline --keep` measured it once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import UserError
from quantkit.files import write_json

MEASURE = "python -m quantkit.bench.roofline --keep"
_DATA = Path(__file__).with_name("hardware.json")
# What an operation computes in where the device has no instructions for its kind of number.
_INSTEAD = {"fp4": "fp8", "fp8": "fp16", "int8": "fp16", "fp16": "fp32"}


@dataclass(frozen=True)
class Hardware:
    """Limits of a device. memory: bytes, None if it varies. bandwidth: bytes/s.

    peak: operations/s (a multiply-add is two) by kind of number: fp32, fp16 (also bf16), int8, fp8, fp4; a kind without
    instructions is missing. source: where the figures are from.
    """

    name: str
    title: str
    memory: float | None
    bandwidth: float
    peak: Mapping[str, float]
    source: str

    def fastest(self, kind: str) -> float:
        """Operations/s of numbers of this kind, or of the next wider kind that the device computes in."""
        while kind not in self.peak and kind in _INSTEAD:
            kind = _INSTEAD[kind]
        return self.peak.get(kind) or max(self.peak.values())

    def attainable(self, operations: float, n_bytes: float, kind: str) -> float:
        """Operations/s that the roofline allows: its peak, or bandwidth times arithmetic intensity."""
        peak = self.fastest(kind)
        return peak if n_bytes == 0 else min(peak, self.bandwidth * operations / n_bytes)

    def seconds(self, operations: float, n_bytes: float, kind: str) -> float:
        """The least time in which the device does so many operations and moves so many bytes."""
        return max(operations / self.fastest(kind), n_bytes / self.bandwidth)

    def report(self) -> dict[str, Any]:
        return asdict(self) | {"peak": dict(self.peak)}


def known() -> dict[str, Hardware]:
    """The published devices by name."""
    entries = json.loads(_DATA.read_text(encoding="utf-8"))
    return {name: Hardware(name, **fields) for name, fields in entries.items()}


def find_hardware(name: str) -> Hardware:
    """A published device by name, or `auto`: this machine as measured; UserError with what there is."""
    if name == "auto":
        return measured()
    devices = known()
    if name.lower() not in devices:
        raise UserError(f"no hardware {name!r}; known are auto, {', '.join(devices)}")
    return devices[name.lower()]


def measured_file() -> Path:
    """Where the figures of this machine are kept: quantkit/hardware.json in XDG_CACHE_HOME, or else in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "quantkit" / "hardware.json"


def measured() -> Hardware:
    """This machine as it was measured; UserError, with the command that measures it, if it was not."""
    file = measured_file()
    others = f"or name a device: {', '.join(known())}"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        found = Hardware(**fields)
        figures = [found.bandwidth, *found.peak.values()]
    except FileNotFoundError:
        raise UserError(f"this machine has not been measured; run `{MEASURE}` once, {others}") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}); run `{MEASURE}` again, {others}") from None
    if not found.peak or not all(type(each) in (int, float) and each > 0 for each in figures):
        raise UserError(f"{file} holds no positive bandwidth and peaks; run `{MEASURE}` again, {others}")
    return found


def keep(found: Hardware) -> Path:
    """Keep the figures of this machine for `measured`; the file they are in."""
    file = measured_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found.report())
    return file


__all__ = ["Hardware", "find_hardware", "keep", "known", "measured", "measured_file"]
