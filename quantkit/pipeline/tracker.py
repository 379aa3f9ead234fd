"""Tells the display what is finished and how long the rest takes (`Estimate`), from a run's clock and small probes."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from quantkit.calibration.block_run import BlockRun
from quantkit.layers.quant_linear import QuantLinear
from quantkit.numerics.weight import QuantizedWeight
from quantkit.pipeline.estimate import Estimate
from quantkit.pipeline.evaluation import TOKENS
from quantkit.pipeline.run import Run
from quantkit.predict import predict

VERIFY, EVALUATE = "verifying the checkpoint", "evaluating"
PROBE_TOKENS = 128
PROBE_BYTES = 16 << 20
STOPS_AT = (
    12288  # tokens at which an evaluation usually knows the KL well enough, if their number is not given
)
AROUND_LINEARS = 1.3  # seconds of a block's forward over those of its linears, where no block was run


class Tracker:
    """Follows one run. done: shards that an earlier run has finished."""

    def __init__(self, run: Run, done: int) -> None:
        self.run = run
        self.estimate = Estimate([_cost(run, part) for part in range(run.plan.n_blocks + 1)], done)
        self._began = time.perf_counter()
        self._once = 0.0
        self._forward: float | None = None  # seconds per token of one block, as it is
        self._probed = False
        self.estimate.expect(VERIFY, predict(run.recipe, run.plan, run.source.headers).tensors * _hashing())

    def opened(self, block: BlockRun) -> None:
        """Called with a block before it is quantized: the first one is run once to see how long that takes."""
        if self._forward is None and self.run.request is not None:
            chunk = block.chunks()[0]
            full = block.streams.quantized is None
            tokens = (chunk.stop - chunk.start) * block.streams.leading.shape[1]
            self._forward = self._probe(lambda: block.forward(chunk, full)) / tokens

    def computed(self, weights: dict[str, QuantizedWeight], block: BlockRun | None = None) -> None:
        """Called with the quantized weights of a part while they are in memory: the first ones are timed."""
        if block is not None:
            self._once += block.seconds_once
        if weights and not self._probed and self.run.request is not None:
            self._probed = True
            self.estimate.expect(EVALUATE, self._evaluation(weights))
            self._once += time.perf_counter() - self._last_probe

    def finished(self, part: int) -> None:
        """A part is written, verified and journalled."""
        now = time.perf_counter()
        self.estimate.block(part, now - self._began, self._once)
        self._began, self._once = now, 0.0
        self.told(part)

    def told(self, part: int) -> None:
        """Report a part as finished."""
        last = part == self.run.plan.n_blocks
        name = "outside the blocks" if last else f"{self.run.plan.blocks_prefix}.{part}"
        self.run.progress.block(part, name, left=self.estimate.left)

    def phase(self, name: str, share: float, seconds: float) -> None:
        """A phase after the blocks has come to `share` in `seconds`."""
        self.estimate.progressed(name, share, seconds)
        self.run.progress.phase(name, share, self.estimate.left)

    def evaluated(self, done: int, windows: int, seconds: float) -> None:
        """The evaluation has come to `done` of at most so many windows."""
        request = self.run.request
        usual = windows if request is None or request.tokens else windows * STOPS_AT / TOKENS
        share = done / usual if done < usual else done / windows
        self.estimate.progressed(EVALUATE, share, seconds)
        self.run.progress.phase(EVALUATE, done / windows, self.estimate.left)

    def _evaluation(self, weights: dict[str, QuantizedWeight]) -> float:
        """Seconds of the closing evaluation, if it stops where evaluations usually do."""
        self._last_probe = time.perf_counter()
        run = self.run
        dense = packed = 0.0
        for weight in weights.values():
            x = torch.zeros(PROBE_TOKENS, weight.shape[1], device=weight.codes.device)
            matrix, layer = weight.dequantize(), QuantLinear.from_quantized(weight, None)
            dense += self._probe(partial(nn.functional.linear, x, matrix)) / PROBE_TOKENS
            packed += self._probe(partial(layer, x)) / PROBE_TOKENS
        elements = sum(math.prod(w.shape) for w in weights.values())
        planned = sum(math.prod(p.shape) for p in run.plan.layers if p.block is not None)
        blocks = planned / elements
        forward = self._forward if self._forward is not None else AROUND_LINEARS * dense
        head = run.model.get_input_embeddings().get_parameter("weight").shape  # on meta: only its shape
        logits = torch.zeros(PROBE_TOKENS, head[0])
        divergence = self._probe(lambda: nn.functional.log_softmax(logits, -1).exp()) / PROBE_TOKENS
        per_token = blocks * (2 * forward + packed - dense)
        per_token += 2 * dense * math.prod(head) / elements + 3 * divergence
        assert run.request is not None
        return per_token * (run.request.tokens or STOPS_AT)

    def _probe(self, call: Callable[[], object]) -> float:
        """Seconds of one call, the second of two, as the first one may have to prepare something."""
        with torch.no_grad():
            call()
            self._wait()
            begin = time.perf_counter()
            call()
            self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)


def _cost(run: Run, part: int) -> float:
    """What a part costs beside others: the weights to quantize, and every byte that is read, written and verified."""
    planned = sum(math.prod(p.shape) for p in run.plans(part))
    return planned + sum(info.nbytes for info in run.parts[part].values()) / 64


def _hashing() -> float:
    """Seconds per byte of sha256."""
    data = bytes(PROBE_BYTES)
    begin = time.perf_counter()
    hashlib.sha256(data).digest()
    return (time.perf_counter() - begin) / PROBE_BYTES
