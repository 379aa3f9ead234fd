"""The hidden states that the walk carries from block to block."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantkit.calibration.spill import Spilled
from quantkit.errors import ModelError

# What blocks hand on beside the hidden states: {where it stands in the call: {key: tensor or tuple of tensors}}
Shared = dict[str, dict[Any, Any]]
Rows = torch.Tensor | Spilled  # in memory, or in a file


@dataclass
class Streams:
    """Hidden states [windows, length, hidden], fp32, on the CPU or in a file; None where nothing needs that stream.

    full: the original model's, perhaps of the first windows only: what is measured on it (AWQ's search, the drift)
    needs fewer than a Hessian. quantized: those behind the blocks that are quantized already. shared: for each
    (whether of the full stream, first window of a chunk), what earlier blocks have put into the dictionaries that the
    model passes from block to block (keys and values that later blocks of Gemma 4 reuse); empty for most models.
    """

    full: Rows | None
    quantized: Rows | None
    shared: dict[tuple[bool, int], Shared] = field(default_factory=dict)

    @property
    def leading(self) -> Rows:
        """The stream that layers will see: the quantized one where there is one."""
        chosen = self.quantized if self.quantized is not None else self.full
        if chosen is None:
            raise ValueError("a walk needs at least one stream of hidden states")
        return chosen

    def of(self, full: bool) -> Rows:
        """One of the two; ValueError if it is not carried."""
        stream = self.full if full else self.quantized
        if stream is None:
            raise ValueError(f"the {'full-precision' if full else 'quantized'} stream is not carried")
        return stream

    def has(self, full: bool, chunk: slice) -> bool:
        """Whether a stream exists and reaches the windows of `chunk`."""
        stream = self.full if full else self.quantized
        return stream is not None and chunk.start < stream.shape[0]

    def to_tensors(self) -> dict[str, Rows]:
        """Everything under one name each, as a safetensors file wants it; `from_tensors` is the inverse."""
        streams = (("full", self.full), ("quantized", self.quantized))
        named: dict[str, Rows] = {k: t for k, t in streams if t is not None}
        for (full, start), mappings in self.shared.items():
            for place, mapping in mappings.items():
                for key, value in mapping.items():
                    parts = enumerate(value) if isinstance(value, tuple) else [(-1, value)]
                    named |= {json.dumps([full, start, place, key, number]): t for number, t in parts}
        return named

    @classmethod
    def from_tensors(cls, named: Mapping[str, Rows]) -> Streams:
        """The streams written by `to_tensors`."""
        found = cls(named.get("full"), named.get("quantized"))
        parts: dict[tuple[Any, ...], dict[int, Rows]] = {}
        for name in named.keys() - {"full", "quantized"}:
            full, start, place, key, number = json.loads(name)
            parts.setdefault((full, start, place, key), {})[number] = named[name]
        for (full, start, place, key), tensors in sorted(parts.items(), key=str):
            value = tensors[-1] if -1 in tensors else tuple(tensors[i] for i in range(len(tensors)))
            found.shared.setdefault((full, start), {}).setdefault(place, {})[key] = value
        return found


def kept(place: str, mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    """A copy of what a block has put into a shared dictionary: contiguous, on the CPU, so that a resumed run, which
    reads it from a file, computes with the same strides; ModelError if it holds anything but tensors.
    """

    def own(value: Any) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"the decoder blocks share a {type(value).__name__} through {place}, and only tensors can be carried "
                "from block to block; quantize it with rtn, without transforms"
            )
        return value.detach().to("cpu").contiguous().clone()

    for key in mapping:
        if not isinstance(key, str | int):
            raise ModelError(
                f"the decoder blocks share {place} under the key {key!r}, which is not supported"
            )
    return {
        key: tuple(map(own, value)) if isinstance(value, tuple | list) else own(value)
        for key, value in mapping.items()
    }
