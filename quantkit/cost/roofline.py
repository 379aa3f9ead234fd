"""The roofline of a forward, operator by operator, as LLM-Viewer counts it (Yuan et al. 2024, arXiv 2402.16363).

An operator of O operations that moves B bytes takes at least max(O / peak, B / bandwidth). With T = batch x queries:

    linear [N, K]   2 N K T operations; the weight as stored, T K inputs and T N outputs
    experts         of E experts, T tokens that choose k each reach E (1 - (1 - k/E)^T) if all are equally likely; only
                    those are read
    qk, sv          2 d operations per head and pair of query and key; queries, cached keys (values), outputs
    softmax, norm   5 per score, 7 per channel
    add             the residual is read and written; the other summand is still where its linear left it

Activations have 16 bits, those of quantized inputs their own width while they are read. `fused` attention keeps scores
on the chip and skips pairs that the mask removes (FlashAttention), which is what a ceiling must assume; the survey's
Table 1 counts the whole square of scores, written and read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from quantkit.cost.attention import EXACT, Attention, entry_bits
from quantkit.cost.hardware import Hardware
from quantkit.cost.model import Linears, Model
from quantkit.scheme import KVScheme, Scheme

ACTIVATION = EXACT / 8  # bytes
BASE = "fp16"  # what is computed in where inputs are not quantized
_ADDS = 2  # residual additions of a block


@dataclass(frozen=True)
class Step:
    """One forward: the last `queries` tokens of `context`, for `batch` sequences. fused: see the module."""

    queries: int
    context: int
    batch: int = 1
    fused: bool = True

    @property
    def tokens(self) -> int:
        return self.queries * self.batch


def prefill(context: int, batch: int = 1, fused: bool = True) -> Step:
    """A prompt of `context` tokens."""
    return Step(context, context, batch, fused)


def decode(context: int, batch: int = 1, fused: bool = True) -> Step:
    """One token per sequence, the last of `context`."""
    return Step(1, context, batch, fused)


@dataclass(frozen=True)
class Operator:
    """`count` operations alike: operations and bytes of one, and the kind of number it computes in."""

    name: str
    count: int
    operations: float
    n_bytes: float
    kind: str = BASE

    @property
    def intensity(self) -> float | None:
        """Operations per byte; None of an operator that moves none."""
        return self.operations / self.n_bytes if self.n_bytes else None

    def on(self, hardware: Hardware) -> Bound:
        """Its limits on a device."""
        given = self.operations, self.n_bytes, self.kind
        least = hardware.seconds(*given)
        by = "memory" if least > self.operations / hardware.fastest(self.kind) else "compute"
        return Bound(self, by, hardware.attainable(*given), least)


@dataclass(frozen=True)
class Bound:
    """An operator on a device. by: "memory" or "compute". attainable: operations/s. each: seconds of one."""

    operator: Operator
    by: str
    attainable: float
    each: float

    @property
    def seconds(self) -> float:
        """The least time of all of them."""
        return self.operator.count * self.each

    def report(self) -> dict[str, Any]:
        one = self.operator
        return {
            "name": one.name,
            "count": one.count,
            "operations": one.operations,
            "bytes": one.n_bytes,
            "intensity": one.intensity,
            "kind": one.kind,
            "bound": self.by,
            "attainable_operations_per_s": self.attainable,
            "seconds": self.seconds,
        }


def operators(model: Model, step: Step) -> list[Operator]:
    """Every operator of one forward, in the order of the model's tensors, then attention and the rest.

    The head computes the last token of each sequence only.
    """
    found = [_experts(each, model, step) if each.experts else _linear(each, step) for each in model.linears]
    layers = Counter(each for each in model.attention if each is not None)
    for number, (attention, count) in enumerate(layers.items()):
        label = f" ({attention.window} tokens)" if attention.window else ""
        found += _attention(attention, label or (f" ({number})" if number else ""), count, model.kv, step)
    width = step.tokens * model.hidden
    found.append(Operator("norm", model.norms, 7 * width, 2 * ACTIVATION * width))
    found.append(Operator("add", _ADDS * model.blocks, width, 2 * ACTIVATION * width))
    found.append(Operator("embedding", 1, 0, 2 * ACTIVATION * width))
    if model.head is not None:
        found.append(_linear(model.head, Step(1, step.context, step.batch)))
    return [each for each in found if each.count]


def bounds(model: Model, step: Step, hardware: Hardware) -> list[Bound]:
    """Every operator with its limits on a device."""
    return [each.on(hardware) for each in operators(model, step)]


def seconds(found: Iterable[Bound]) -> float:
    """The least time of a forward whose operators run one after the other."""
    return sum(each.seconds for each in found)


def _kind(scheme: Scheme | None) -> str:
    """The kind of number that a linear is computed in: that of its inputs."""
    if scheme is None or scheme.inputs is None:
        return BASE
    number = scheme.inputs.number
    return f"{'int' if number.kind == 'int' else 'fp'}{8 if number.bits > 4 or number.kind == 'int' else 4}"


def _io(shape: tuple[int, int], scheme: Scheme | None) -> float:
    """Bytes that one token moves through a linear: its inputs as they are read, its outputs."""
    n, k = shape
    read = ACTIVATION if scheme is None or scheme.inputs is None else scheme.inputs.bits / 8
    return k * read + n * ACTIVATION


def _linear(one: Linears, step: Step) -> Operator:
    n, k = one.shape
    moved = one.n_bytes + step.tokens * _io(one.shape, one.scheme)
    return Operator(one.name, one.count, 2 * n * k * step.tokens, moved, _kind(one.scheme))


def _experts(one: Linears, model: Model, step: Step) -> Operator:
    """The same linear of all experts of a block, as one operator: those that are reached are read once."""
    n, k = one.shape
    share = min(1.0, model.chosen / one.experts)
    here = one.count / one.layers  # experts of this shape and scheme in a block
    reached = here * (1 - (1 - share) ** step.tokens)
    rows = step.tokens * share * here
    moved = reached * one.n_bytes + rows * _io(one.shape, one.scheme)
    return Operator(one.name, one.layers, 2 * n * k * rows, moved, _kind(one.scheme))


def _attention(
    attention: Attention, label: str, count: int, kv: KVScheme | None, step: Step
) -> list[Operator]:
    """qk, softmax and sv of `count` blocks."""
    one = attention.absorbed() if step.queries == 1 else attention
    seen = one.seen(step.queries, step.context)
    square = step.queries * seen
    pairs = step.batch * one.heads * (one.pairs(step.queries, step.context) if step.fused else square)
    scores = 0.0 if step.fused else step.batch * one.heads * square * ACTIVATION
    cached = None if kv is None or one.latent else kv
    keys, values = (None, None) if cached is None else (cached.keys, cached.values)
    entries, rows = step.batch * seen * one.kv_heads, step.tokens * one.heads * ACTIVATION
    k_bytes = entries * one.key * entry_bits(keys, one.key) / 8
    v_bytes = entries * one.value * entry_bits(values, one.value) / 8
    if one.latent and step.queries == 1 and step.fused:
        v_bytes = 0  # the value is the key that has just been read
    return [
        Operator(f"qk{label}", count, 2 * pairs * one.key, rows * one.key + k_bytes + scores),
        Operator(f"softmax{label}", count, 5 * pairs, 2 * scores),
        Operator(f"sv{label}", count, 2 * pairs * one.value, rows * one.value + v_bytes + scores),
    ]


__all__ = ["Bound", "Operator", "Step", "bounds", "decode", "operators", "prefill", "seconds"]
