"""Which way a model runs token by token: native on the CPU, in a CUDA graph on a GPU, else eager in transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit_eval.model import device_of
from quantkit_eval.protocols import CausalLM

from quantkit.errors import BackendError
from quantkit.runtime.graphs import GraphDecoder, graphed
from quantkit.runtime.native import NativeDecoder, native

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAYS = ("native", "graph", "eager")
_FASTEST = {"cpu": "native", "cuda": "graph"}


@dataclass(frozen=True)
class Runner:
    """What runs a model token by token.

    model: called like the model. way: one of WAYS. reason: why it is eager, unless that was asked for.
    """

    model: CausalLM
    way: str
    reason: str | None = None

    @property
    def ran(self) -> str:
        """The way the steps went; a graph that could not be captured ran eager, and a warning said why."""
        return "eager" if getattr(self.model, "why_eager", None) else self.way


def choose_runner(
    model: PreTrainedModel | NativeDecoder | GraphDecoder,
    max_new_tokens: int,
    way: str = "auto",
    compute: str | None = None,
) -> Runner:
    """The runner of one sequence of a prompt and max_new_tokens tokens.

    way: "auto" takes the fastest way that this model can go here, with the reason if that is eager; a way named is
    taken, or a BackendError says why it cannot be. compute: see `native`. A decoder runs the way it was made for.
    """
    if isinstance(model, NativeDecoder | GraphDecoder):
        return Runner(model, "native" if isinstance(model, NativeDecoder) else "graph")
    if way not in ("auto", *WAYS):
        raise BackendError(f"unknown way to run {way!r}; known: auto, {', '.join(WAYS)}")
    wanted = _FASTEST.get(device_of(model).type, "eager") if way == "auto" else way
    if wanted == "eager":
        reason = None if way == "eager" else f"there is no faster way on {device_of(model)}"
        return Runner(model, "eager", reason)
    found = native(model, compute) if wanted == "native" else graphed(model, max_new_tokens)
    if not isinstance(found, str):
        return Runner(found, wanted)
    if way != "auto":
        raise BackendError(f"the model cannot run {way}: {found}")
    return Runner(model, "eager", found)
