"""Several sequences of a model at once: natively in one step for all, else in transformers, padded or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from quantkit_eval.model import device_of
from quantkit_eval.together import Apart, Batch, Padded

from quantkit.errors import BackendError
from quantkit.layers.kv_cache import attached
from quantkit.runtime import native as native_path
from quantkit.runtime.dispatch import Runner, choose_runner
from quantkit.runtime.graphs import GraphDecoder, unfit
from quantkit.runtime.native import NativeDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NativeBatch:
    """Sequences of the native decoder. Prompts run one after the other, steps together: the weights are read once.

    Every sequence gets what it would get alone, bit for bit, unless weights are in FP8 or NF4 (see `step_together`).
    """

    def __init__(self, decoder: NativeDecoder) -> None:
        self.decoder = decoder
        self.sequences: list[native_path.Sequence] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        self.sequences = [self.decoder.start() for _ in prompts]
        return self.append(prompts)

    def append(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """More tokens for each sequence; logits [B, vocabulary] after the last ones."""
        pairs = zip(self.sequences, tokens, strict=True)
        return torch.cat([sequence.append(torch.tensor(list(part))) for sequence, part in pairs])

    def step(self, live: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        return native_path.Sequence.step([self.sequences[i] for i in live], torch.tensor(list(tokens)))


_ONE = "a CUDA graph holds one sequence"


def choose_batch(
    model: PreTrainedModel | NativeDecoder | GraphDecoder, way: str = "auto"
) -> tuple[Batch, Runner]:
    """What runs several sequences of a model, and the runner with its way and, if that is eager, the reason.

    way: as of `choose_runner`. A CUDA graph holds one sequence, so "auto" runs several eager there, and "graph" is a
    BackendError. Transformers runs them in one padded forward if its cache is plain keys and values; recurrent models,
    quantized caches and rotary embeddings that depend on the length would see the padding, so their sequences run one
    by one.
    """
    if isinstance(model, GraphDecoder):
        model = model.model
    if way == "graph" and not isinstance(model, NativeDecoder):
        raise BackendError(f"{_ONE}; run several eager, or one at a time")
    if way == "auto" and not isinstance(model, NativeDecoder) and device_of(model).type == "cuda":
        runner = Runner(model, "eager", _ONE)
    else:
        runner = choose_runner(model, 1, way)
    if isinstance(runner.model, NativeDecoder):
        return NativeBatch(runner.model), runner
    eager = cast("PreTrainedModel", runner.model)
    padded = attached(eager) is None and unfit(eager) is None
    return (Padded if padded else Apart)(runner.model), runner
