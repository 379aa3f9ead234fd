"""Tells the display what is finished and how long the rest takes (`Estimate`), from a run's clock and small probes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from quantkit_eval.divergence import token_agreement, token_kl
from quantkit_eval.perplexity import token_nll
from torch import nn

from quantkit.calibration.block_run import BlockRun
from quantkit.cost.rates import known_rates
from quantkit.cost.time import Duration, duration
from quantkit.layers.quant_linear import QuantLinear
from quantkit.numerics.weight import QuantizedWeight
from quantkit.pipeline.estimate import Estimate
from quantkit.pipeline.evaluation import CONTEXT, TOKENS
from quantkit.pipeline.run import Run, beyond
from quantkit.predict.sizes import predict

SEARCH, VERIFY, EVALUATE = "searching", "verifying the checkpoint", "evaluating"
PROBE_TOKENS = 512  # with fewer, a call to the packed kernels costs several times as much per token
PROBE_BYTES = 16 << 20
# Windows after which an evaluation that may stop early is expected to stop. The least is 16, which is what two models
# rounded to nearest needed; AWQ and GPTQ needed 24 and 40 (docs/LOG.md, 2026-11-28).
STOPS_AT = 18
BEFORE_EVALUATION = 1.0  # seconds to build two models and to read the text
AROUND_LINEARS = 1.3  # seconds of a block's forward over those of its linears, where no block was run


class Tracker:
    """Follows one run. done: shards that an earlier run has finished; None if its checkpoint needs only evaluation."""

    def __init__(self, run: Run, done: int | None) -> None:
        self.run, self.now = run, run.clock.now
        parts = run.plan.n_blocks + 1
        self.expected = expected(run)
        costs = self.expected.parts if self.expected else [_cost(run, part) for part in range(parts)]
        self.estimate = Estimate(costs, parts if done is None else done, predicted=self.expected is not None)
        self._began = self.now()
        self._once = 0.0  # seconds of the current part that the next parts will not need
        self._forward: float | None = None  # seconds per token of one unquantized block
        self._probed = False
        self._first_report: tuple[int, float] | None = None  # of the evaluation: windows, seconds
        if done is not None:
            written = predict(run.recipe, run.plan, run.source.headers).tensors
            self.estimate.expect(VERIFY, written * _hashing(self.now))
        phases = self.expected.phases if self.expected else {}
        if done == 0 and "search" in phases:
            self.estimate.expect(SEARCH, phases["search"])
        # what a budget leaves no room for is not timed either: that takes memory
        self._request = None if beyond(run) else run.request
        if self._request is not None:
            self.estimate.expect(EVALUATE, phases.get("evaluate"))

    def searched(self, share: float, seconds: float) -> None:
        """The search before the first block has come to `share`, 0 to 1, in `seconds`."""
        if not share and self.expected is None:
            self.estimate.expect(SEARCH, None)
        self.phase(SEARCH, share, seconds)
        self._began = self.now()

    def opened(self, block: BlockRun) -> None:
        """Called with a block before it is quantized: the first one is run to see how long that takes."""
        if self._forward is None and self._request is not None:
            chunk = block.chunks()[0]
            full = block.streams.quantized is None
            tokens = (chunk.stop - chunk.start) * block.streams.leading.shape[1]
            with self._extra():
                self._forward = self._probe(lambda: block.forward(chunk, full)) / tokens

    def computed(self, weights: dict[str, QuantizedWeight], block: BlockRun | None = None) -> None:
        """Called with the quantized weights of a part while they are in memory: the first ones are timed."""
        if block is not None:
            self._once += block.seconds_once
        if weights and not self._probed and self._request is not None:
            self._probed = True
            with self._extra():
                self.estimate.expect(EVALUATE, self._evaluation(weights, self._request.tokens))

    @contextmanager
    def _extra(self) -> Iterator[None]:
        """Work that only this estimate needs, once."""
        begin = self.now()
        yield
        self._once += self.now() - begin

    def finished(self, part: int) -> None:
        """A part is written, verified and journalled."""
        now = self.now()
        self.estimate.block(part, now - self._began, self._once)
        self._began, self._once = now, 0.0
        self.run.clock.block(self._name(part))
        self.told(part)

    def told(self, part: int) -> None:
        """Report a part as finished."""
        self.run.progress.block(part, self._name(part), left=self.estimate.left)

    def _name(self, part: int) -> str:
        last = part == self.run.plan.n_blocks
        return "outside the blocks" if last else f"{self.run.plan.blocks_prefix}.{part}"

    def phase(self, name: str, share: float, seconds: float) -> None:
        """A phase beside the blocks has come to `share` in `seconds`."""
        self.estimate.progressed(name, share, seconds)
        self.run.progress.phase(name, share, self.estimate.left)

    def evaluated(self, done: int, windows: int, seconds: float) -> None:
        """The evaluation has run `done` of at most `windows` windows in `seconds`.

        Its pace is measured from its first report on, since what came before includes opening the models. An evaluation
        that may stop early and is past STOPS_AT is expected to need a quarter more windows.
        """
        early = self.run.request is not None and self.run.request.tokens is None
        expected = min(windows - done, max(STOPS_AT - done, done / 4)) if early else windows - done
        first, then = self._first_report or (0, 0.0)
        self._first_report = self._first_report or (done, seconds)
        self.estimate.expect(EVALUATE, expected * (seconds - then) / (done - first))
        self.run.progress.phase(EVALUATE, done / windows, self.estimate.left)

    def _evaluation(self, weights: dict[str, QuantizedWeight], wanted: int | None) -> float:
        """Seconds of the closing evaluation on `wanted` tokens; None: until it usually stops.

        weights: quantized ones of any part. Their time as dense and as packed linears stands for that of all linears.
        """
        run = self.run
        dense = packed = 0.0  # seconds per token
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
        per_token = blocks * (2 * forward + packed - dense)
        per_token += 2 * dense * math.prod(head) / elements
        tokens = max(1, min(PROBE_TOKENS, PROBE_BYTES // (4 * head[0])))
        logits = torch.zeros(tokens, head[0], device=run.device)
        per_token += self._probe(partial(_compare, logits)) / tokens
        context = min(run.recipe.calibration.sequence_length, CONTEXT)
        return BEFORE_EVALUATION + per_token * (wanted or min(TOKENS, STOPS_AT * context))

    def _probe(self, call: Callable[[], object]) -> float:
        """Seconds of one call: the faster of two, after one that may have to prepare something."""
        taken = []
        with torch.no_grad():
            call()
            for _ in range(2):
                self._wait()
                begin = self.now()
                call()
                self._wait()
                taken.append(self.now() - begin)
        return min(taken)

    def _wait(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)


def _compare(logits: torch.Tensor) -> None:
    """Do what an evaluation does with the logits [tokens, vocabulary] of two models; here both are the same."""
    targets = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    both = [logits.log_softmax(-1) for _ in range(2)]
    for one in both:
        torch.isfinite(logits).all()
        token_nll(one, targets)
    token_kl(*both)
    token_agreement(*both)


def expected(run: Run) -> Duration | None:
    """What a run is expected to take; None if this machine was not measured, or is not what computes."""
    rates = known_rates()
    if rates is None or run.device.type != "cpu" or run.ranks.size > 1:
        return None
    return duration(run.recipe, run.plan, run.source.headers, rates, run.ways)


def _cost(run: Run, part: int) -> float:
    """What a part costs beside others: the weights to quantize, and every byte that is read, written and verified."""
    planned = sum(math.prod(p.shape) for p in run.plans(part))
    return planned + sum(info.nbytes for info in run.parts[part].values()) / 64


def _hashing(now: Callable[[], float]) -> float:
    """Seconds per byte of sha256."""
    data = bytes(PROBE_BYTES)
    begin = now()
    hashlib.sha256(data).digest()
    return (now() - begin) / PROBE_BYTES
