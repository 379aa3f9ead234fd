"""How the linears of a block run, by their names and shapes: which share an input, and in which order; without torch.

What runs is found out from the model itself (`structure/`); this is enough to predict what it costs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from quantkit.models import families
from quantkit.models.blocks import hidden_size
from quantkit.models.headers import Headers
from quantkit.plan import LayerPlan, Plan
from quantkit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from quantkit.algorithms.config import AlgorithmConfig

FLOAT = 4  # bytes; weights, statistics and hidden states are computed in fp32
CHUNK = 1 << 20  # tokens of one chunk of windows times the widest layer: the bound of calibration/walk.py
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
_OUTPUT = re.compile(
    r"(^|\.)(o_proj|out_proj|down_proj|c_proj|dense|dense_4h_to_h|wo|w2|fc2|fc_out|out_lin|lin2|proj|attn_out|ff_out)$"
)
_ATTENTION = re.compile(r"attn|attention|mixer", re.IGNORECASE)
_EXPERT = re.compile(r"^(.*?\bexperts)\.(\d+)\.")


@dataclass(frozen=True, eq=False)
class Siblings:
    """Linears that share an input. output: whether they end their part of the block.

    attention: whether their part is attention.
    """

    layers: tuple[LayerPlan, ...]
    output: bool
    attention: bool

    @property
    def columns(self) -> int:
        return self.layers[0].shape[1]

    @property
    def rows(self) -> int:
        return sum(layer.shape[0] for layer in self.layers)

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that their algorithms collect."""
        return frozenset().union(*(layer.algorithm.needs for layer in self.layers))

    @property
    def algorithm(self) -> AlgorithmConfig:
        """Of the first one."""
        return self.layers[0].algorithm


@dataclass(frozen=True, eq=False)
class BlockShape:
    """The planned linears of one block. own: in the order in which they run. experts: those of one expert.

    count: how many experts there are. stored: bytes of the block's tensors without its experts; of one expert.
    """

    own: tuple[Siblings, ...]
    experts: tuple[Siblings, ...] = ()
    count: int = 0
    stored: int = 0
    expert_stored: int = 0

    @property
    def every(self) -> tuple[Siblings, ...]:
        return (*self.own, *self.experts)

    @property
    def sequential(self) -> bool:
        """Whether the linears of a block are calibrated set by set."""
        return any(getattr(each.algorithm, "true_sequential", False) for each in self.every)

    @property
    def weights(self) -> int:
        """Of the linears that are quantized, those of all experts too."""
        return sum(s.weights for s in self.own) + self.count * sum(s.weights for s in self.experts)


@lru_cache(maxsize=2)  # a mixture has tens of thousands of linears, and this is asked several times
def blocks_of(plan: Plan, headers: Headers) -> Mapping[int | None, BlockShape]:
    """The shape of every block that has planned linears, by its number; None: what lies outside the blocks."""
    own: dict[int | None, list[LayerPlan]] = {}
    first: dict[int | None, tuple[str, list[LayerPlan]]] = {}
    count: dict[int | None, set[str]] = {}
    for layer in plan.layers:
        match = _EXPERT.match(layer.name)
        if match is None:
            own.setdefault(layer.block, []).append(layer)
            continue
        count.setdefault(layer.block, set()).add(match[0])
        if first.setdefault(layer.block, (match[0], []))[0] == match[0]:
            first[layer.block][1].append(layer)
    stored: dict[int | None, list[int]] = {}
    for disk, number in plan.parts.items():
        info = headers.tensors.get(disk)
        if info is not None and disk not in headers.dropped:
            each = stored.setdefault(number, [0, 0])
            each[bool(families.EXPERT_TENSOR.search(disk))] += info.dense_bytes
    found: dict[int | None, BlockShape] = {}
    for block in own.keys() | first.keys():
        experts, outside = len(count.get(block, ())), stored.get(block, [0, 0])
        found[block] = BlockShape(
            _siblings(own.get(block, ())),
            _siblings(first[block][1]) if block in first else (),
            experts,
            outside[0] if experts else sum(outside),
            outside[1] // experts if experts else 0,
        )
    return dict(sorted(found.items(), key=lambda each: math.inf if each[0] is None else each[0]))


def kinds_of(blocks: Mapping[int | None, BlockShape]) -> dict[int | None, BlockShape]:
    """The same with one object for all blocks alike: a deep model has a few kinds."""
    known: dict[tuple[object, ...], BlockShape] = {}
    found = {}
    for number, shape in blocks.items():
        each = tuple((s.rows, s.columns, id(s.algorithm), id(s.layers[0].scheme)) for s in shape.every)
        found[number] = known.setdefault((shape.stored, shape.count, each), shape)
    return found


def _siblings(layers: Iterable[LayerPlan]) -> tuple[Siblings, ...]:
    """Sets of linears with one input: attention first, and what ends a part behind what begins it."""
    found: dict[tuple[bool, str, bool, int], list[LayerPlan]] = {}
    for layer in layers:
        parent = layer.name.rpartition(".")[0]
        attention, output = bool(_ATTENTION.search(parent)), bool(_OUTPUT.search(layer.name))
        found.setdefault((not attention, parent, output, layer.shape[1]), []).append(layer)
    return tuple(Siblings(tuple(each), key[2], not key[0]) for key, each in sorted(found.items()))


def chosen_experts(text: Mapping[str, Any]) -> int:
    """Experts that a token uses by the config of the language model; 0 if it does not say."""
    return next((int(text[key]) for key in _CHOSEN if type(text.get(key)) is int), 0)


def hidden(plan: Plan, headers: Headers) -> int:
    """Width of the hidden states; where the config does not name it, the narrowest input of a block's linears."""
    found = hidden_size(headers.config)
    if found is not None:
        return found
    return min((layer.shape[1] for layer in plan.kinds), default=plan.widest)


def needs(layers: Iterable[LayerPlan]) -> frozenset[str]:
    """Statistics that the algorithms of these layers collect."""
    return frozenset().union(*(layer.algorithm.needs for layer in layers))


def chunk_windows(recipe: Recipe, plan: Plan) -> int:
    """How many windows run at once, as calibration/walk.py decides it."""
    widest = max((max(layer.shape) for layer in plan.kinds), default=plan.widest)
    calibration = recipe.calibration
    return max(1, min(calibration.samples, CHUNK // (calibration.sequence_length * widest)))


def streams_of(recipe: Recipe, plan: Plan) -> tuple[int, int]:
    """Windows whose hidden states are carried: of the original model, behind the quantized layers."""
    wanted, every = needs(plan.kinds), recipe.calibration.samples
    looked = (getattr(transform, "windows", 0) for transform in recipe.transforms)
    full = max((every if windows is None else windows for windows in looked), default=0)
    if "drift" in wanted:
        full = max(full, -(-every // 2))
    quantized = every if plan.follows_quantized else 0
    if wanted and (not quantized or plan.on_original):
        full = every
    batch = chunk_windows(recipe, plan)
    return min(every, -(-full // batch) * batch), quantized
