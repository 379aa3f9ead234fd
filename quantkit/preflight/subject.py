"""What the rules look at: the linears of a checkpoint, written or planned, and what its config.json says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from quantkit.scheme import KVScheme, Scheme

EMBEDDING = re.compile(r"(embed|wte|wpe)[^.]*$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)$")
_MTP = re.compile(r"(^|\.)mtp(_layers|_block)?\.")


@dataclass(frozen=True)
class Linear:
    """A weight [N, K] by its name on disk. scheme: None for one that is not quantized.

    format: of the file: "compressed-tensors", "gptq" or "awq". transposed: it is a Conv1D of the original model.
    """

    name: str
    shape: tuple[int, int]
    scheme: Scheme | None
    format: str = "compressed-tensors"
    transposed: bool = False

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Subject:
    """A checkpoint. config: its config.json. quantization: its `quantization_config`. kv: how its cache is quantized.

    names: those of all its tensors that the linears do not say, such as norms and further heads.
    """

    linears: Sequence[Linear]
    config: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)
    kv: KVScheme | None = None
    names: Sequence[str] = ()

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def text(self) -> Mapping[str, Any]:
        """The part of config.json about the language model."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    @cached_property
    def quantized(self) -> list[Linear]:
        return [linear for linear in self.linears if linear.scheme is not None]

    def count(self, *keys: str) -> int | None:
        """The first whole number above 0 that config.json has under one of the keys."""
        for part in (self.text, self.config):
            for key in keys:
                if type(part.get(key)) is int and part[key] > 0:
                    return int(part[key])
        return None

    def of_mtp(self, name: str) -> bool:
        """Whether a tensor or linear belongs to a layer that predicts further tokens."""
        blocks = self.count("num_hidden_layers")
        number = re.match(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d{1,6})\.", name)
        return bool(_MTP.search(name)) or (
            number is not None and blocks is not None and int(number[1]) >= blocks
        )


@dataclass(frozen=True)
class Finding:
    """Something an engine refuses or gets wrong. layers: how many linears and one of them, "" for the whole model.

    numbers: what does not fit, with its numbers. remedy: what to change. source: where the engine says so.
    """

    rule: str
    layers: str
    numbers: str
    remedy: str
    source: str

    def __str__(self) -> str:
        where = f"{self.layers}: " if self.layers else ""
        return f"{where}{self.numbers}; {self.remedy} [{self.source}]"

    def report(self) -> dict[str, str]:
        """As JSON has it."""
        return dict(vars(self))


def starred(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def gathered(found: Sequence[tuple[str, Finding]]) -> list[Finding]:
    """One finding for all linears, given by name, with the same words; their names starred and counted."""
    counts: Counter[tuple[str, Finding]] = Counter((starred(name), finding) for name, finding in found)
    return [
        Finding(each.rule, f"{name} ({count})", each.numbers, each.remedy, each.source)
        for (name, each), count in counts.items()
    ]
