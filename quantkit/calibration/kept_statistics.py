"""Statistics of the original model's inputs, kept in files: collected once, used by every recipe that can, added up.

What is measured on the full-precision stream does not depend on the recipe being tried. A set of it is a folder:

    statistics.json              schema "quantkit-statistics/1": `model`, the digest of the model's files; `data`, that
                                 of each calibration text in it (token ids); `linears`, for each linear the one whose
                                 tensors it has, as siblings share them; `tokens` seen by each of those; `blocks`,
                                 the file of each block; `seconds` that collecting took
    block-00000.safetensors ...  per linear L of a block, with K its inputs:
                                 L.hessian fp32 [K, K], 2/tokens sum x xT; L.fired uint8 [K], x was nonzero once;
                                 L.amax, L.mean_abs, L.mean_square fp32 [K]

All are means over tokens, or maxima, so sets of the same model add up: means weighted by their tokens, in fp64.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from quantkit.errors import DataError
from quantkit.files import write_atomically, write_json
from quantkit.models.json_reader import read_json
from quantkit.numerics.statistics import Statistics

SCHEMA = "quantkit-statistics/1"
INDEX = "statistics.json"
FIELDS = frozenset({"hessian", "amax", "mean_abs", "mean_square"})
_MEANS = ("hessian", "mean_abs", "mean_square")
_AGAIN = "remove the folder, and it is collected again"


@dataclass(frozen=True)
class KeptStatistics:
    """A set that is complete. model, data, linears, tokens, blocks, seconds: as in the file."""

    folder: Path
    model: str
    data: tuple[str, ...]
    linears: Mapping[str, str]
    tokens: Mapping[str, int]
    blocks: Mapping[str, str]
    seconds: float

    def covers(self, modules: Iterable[str]) -> bool:
        """Whether every one of some linears, by module name, is in it."""
        return all(name in self.linears for name in modules)

    def of(self, module: str, fields: Iterable[str]) -> Statistics:
        """Fields of the statistics of a linear's input."""
        owner = self.linears[module]
        block = next(each for each in self.blocks if owner.startswith(f"{each}."))
        found = Statistics(tokens=self.tokens[owner])
        with safe_open(self.folder / self.blocks[block], framework="pt") as file:
            for field in fields:
                setattr(found, field, file.get_tensor(f"{owner}.{field}"))
            if found.hessian is not None:
                found.fired = file.get_tensor(f"{owner}.fired").bool()
        return found


def open_statistics(folder: Path) -> KeptStatistics:
    """A set of statistics; DataError for a folder that is none, or an unfinished one."""
    path = folder / INDEX
    if not path.is_file():
        raise DataError(f"{folder} holds no statistics ({INDEX} is missing); {_AGAIN}")
    found = read_json(path, DataError, advice=_AGAIN)
    if found.get("schema") != SCHEMA:
        raise DataError(f"{path} has the schema {found.get('schema')!r}, not {SCHEMA!r}; {_AGAIN}")
    parts = {key: found[key] for key in ("model", "linears", "tokens", "blocks", "seconds")}
    return KeptStatistics(folder, data=tuple(found["data"]), **parts)


class StatisticsWriter:
    """Writes a set, block by block; it is one only when `finish` was called."""

    def __init__(self, folder: Path, model: str, data: Sequence[str]) -> None:
        self.folder, self._began = folder, time.perf_counter()
        self._about = {"schema": SCHEMA, "model": model, "data": sorted(data)}
        self._linears: dict[str, str] = {}
        self._tokens: dict[str, int] = {}
        self._blocks: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)

    def add(self, block: str, statistics: Mapping[tuple[str, ...], Statistics]) -> None:
        """Write one block. statistics: by siblings, module names."""
        file, tensors = f"block-{len(self._blocks):05d}.safetensors", {}
        for siblings, found in statistics.items():
            self._linears |= dict.fromkeys(siblings, siblings[0])
            self._tokens[siblings[0]] = found.tokens
            assert found.fired is not None
            tensors[f"{siblings[0]}.fired"] = found.fired.to(torch.uint8).cpu()
            tensors |= {f"{siblings[0]}.{f}": getattr(found, f).cpu().contiguous() for f in FIELDS}
        write_atomically(self.folder / file, iter([save(tensors)]))
        self._blocks[block] = file

    def finish(self) -> KeptStatistics:
        """Write the index; the set."""
        parts: dict[str, Any] = {"linears": self._linears, "tokens": self._tokens, "blocks": self._blocks}
        parts["seconds"] = time.perf_counter() - self._began
        write_json(self.folder / INDEX, self._about | parts)
        return open_statistics(self.folder)


def merge(sets: Sequence[KeptStatistics], folder: Path) -> KeptStatistics:
    """Add up sets of one model, of other texts or processes each; DataError for other models or the same text twice."""
    texts = [text for each in sets for text in each.data]
    if len({(each.model, json.dumps(dict(each.linears), sort_keys=True)) for each in sets}) != 1:
        raise DataError("statistics of different models cannot be added up; collect them on one model")
    if len(set(texts)) < len(texts):
        raise DataError("two of the sets hold the same text, whose tokens would count twice; leave one out")
    writer = StatisticsWriter(folder, sets[0].model, texts)
    groups: dict[str, list[str]] = {}
    for name, owner in sets[0].linears.items():
        groups.setdefault(owner, [owner]).extend([name] if name != owner else [])
    for block in sets[0].blocks:
        own = [siblings for owner, siblings in groups.items() if owner.startswith(f"{block}.")]
        writer.add(block, {tuple(each): _added([one.of(each[0], FIELDS) for one in sets]) for each in own})
    return writer.finish()


def _added(found: Sequence[Statistics]) -> Statistics:
    """Statistics over the tokens of all."""
    total = sum(each.tokens for each in found)
    merged = Statistics(tokens=total)
    for field in _MEANS:
        parts = [getattr(each, field).double() * (each.tokens / max(1, total)) for each in found]
        setattr(merged, field, torch.stack(parts).sum(0).float())
    merged.amax = torch.stack([_there(each.amax) for each in found]).amax(0)
    merged.fired = torch.stack([_there(each.fired) for each in found]).any(0)
    return merged


def _there(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


def divided(statistics: Statistics, columns: torch.Tensor) -> Statistics:
    """Statistics of x / columns from those of x; columns: [K]."""
    s = columns.abs().double()
    changed: dict[str, Any] = {}
    for field, by in (("amax", s), ("mean_abs", s), ("mean_square", s * s)):
        if (value := getattr(statistics, field)) is not None:
            changed[field] = (value.double() / by).float()
    if statistics.hessian is not None:
        signed = columns.double()
        changed["hessian"] = (statistics.hessian.double() / signed[:, None] / signed).float()
    return replace(statistics, **changed)
