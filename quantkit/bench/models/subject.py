"""A model to be measured: how it is opened, the way it runs, and what it consists of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit_eval.model import longest_context

from quantkit.bench.models import anatomy
from quantkit.bench.models.anatomy import Weight
from quantkit.errors import UserError
from quantkit.layers.kv_cache import attached
from quantkit.layers.quant_linear import QuantLinear
from quantkit.runtime import NativeDecoder, Runner, choose_batch, choose_runner

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Opening:
    """How a model is opened: options of `quantkit.load`, and the way it runs, of `quantkit.runtime.choose_runner`."""

    path: str
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    compute: str = "float"
    kv_cache: str | None = None
    way: str = "auto"
    verify: bool = False

    @property
    def name(self) -> str:
        """The folder's name, with what is not the default."""
        changed = [
            value
            for value, usual in (
                (self.backend, "auto"),
                (self.compute, "float"),
                (self.kv_cache, None),
                (self.way, "auto"),
            )
            if value != usual
        ]
        return " ".join([Path(self.path).name or self.path, *map(str, changed)])

    def report(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """A loaded model. name: unique in a report. weights: what a forward multiplies by."""

    name: str
    opening: Opening
    model: PreTrainedModel
    weights: list[Weight]

    def runner(self, batch: int, new: int) -> Runner:
        """What runs so many sequences; a CUDA graph holds one, so more of them run eager (docs/bench.md)."""
        way = self.opening.way
        if batch == 1:
            return choose_runner(self.model, new + 1, way)
        return choose_batch(self.model, "auto" if way == "graph" else way)[1]

    @property
    def entry_bytes(self) -> int:
        """Bytes of a number in an exact cache: the native decoder's is fp32."""
        return 4 if self._native else self.model.dtype.itemsize

    @property
    def compute(self) -> str:
        """How packed linears are multiplied."""
        found = {module.compute for module in self.model.modules() if isinstance(module, QuantLinear)}
        return " and ".join(sorted(found)) or "float"

    @property
    def _native(self) -> bool:
        return isinstance(self.runner(1, 1).model, NativeDecoder)

    def report(self) -> dict[str, Any]:
        """What it is, for the JSON."""
        runner, told = self.runner(1, 1), attached(self.model)
        return {
            "name": self.name,
            "path": self.opening.path,
            "options": self.opening.report(),
            "way": runner.way,
            "reason": runner.reason,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "compute": self.compute,
            "kv_cache": "exact" if told is None else str(told.scheme),
            "weight_bytes": sum(one.count * one.n_bytes for one in self.weights),
            "kinds": anatomy.kinds(self.weights),
        }


def open_subject(opening: Opening, name: str | None = None) -> Subject:
    """Load a model; BackendError or ModelError if that cannot be."""
    import torch
    from quantkit_kernels.cpu import library

    from quantkit.checkpoint.load import load

    model = load(
        opening.path,
        device=opening.device,
        dtype=None if opening.dtype == "auto" else getattr(torch, opening.dtype),
        backend=opening.backend,
        compute=opening.compute,
        verify=opening.verify,
        kv_cache=opening.kv_cache,
    )
    plain = Subject(name or opening.name, opening, model, [])
    native = library.isa() if isinstance(plain.runner(1, 1).model, NativeDecoder) else None
    found = list(anatomy.weights(model, native, opening.compute))
    return Subject(plain.name, opening, model, found)


def open_subjects(openings: list[Opening]) -> list[Subject]:
    """Models to be measured in one process, on one device; those of one name are numbered."""
    names = [opening.name for opening in openings]
    numbered = [
        name if names.count(name) == 1 else f"{name} #{1 + names[:place].count(name)}"
        for place, name in enumerate(names)
    ]
    return [open_subject(opening, name) for opening, name in zip(openings, numbered, strict=True)]


def prompt_length(subjects: list[Subject], wanted: int | None, new: int, contexts: list[int]) -> int:
    """Tokens of the prompt: `wanted`, or at most 512 that fit; UserError for more than a model was made for."""
    known = [most for one in subjects if (most := longest_context(one.model))]
    room = min(known, default=1 << 30) - max(contexts) - new - 1
    if room < (wanted or 1):
        raise UserError(
            f"{max(contexts)} tokens of context, {wanted or 1} of prompt and {new + 1} new ones are more than "
            f"the {min(known)} that a model was made for; ask for fewer"
        )
    return wanted or min(512, room)
