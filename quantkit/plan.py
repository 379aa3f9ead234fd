"""What a recipe does to every linear of a checkpoint, decided from the headers of its files.

No weight is read, and torch is not imported, so that `quantkit validate --model` answers at once. Headers know names
and shapes, not what a module is: a 2-D `.weight` may also be a router or a table. `quantize` therefore plans again
when it has built the empty model, with the place of every tensor in it (`places`). Until then, and for linears that
must not be rounded although they are linears, `families.SET_ASIDE` says which names are left as they are.

A linear is called as on disk, without `.weight`. What lies outside the numbered decoder blocks (an output head, a
projection) stays as it is unless a rule names it and names no ordinary linear of the blocks; towers of a multimodal
model and tensors that the model does not have are carried, whatever the rules say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from quantkit.algorithms.config import AlgorithmConfig
from quantkit.errors import ModelError, RecipeError
from quantkit.models import families
from quantkit.models.blocks import Blocks, find_blocks
from quantkit.models.headers import Headers
from quantkit.models.names import find_linears
from quantkit.recipe.recipe import Recipe
from quantkit.recipe.schemes import InputRange, Rule, Weights
from quantkit.scheme import Grid, KVScheme, Scheme

if TYPE_CHECKING:
    from quantkit.models.places import Places

ENGINE_GROUPS = (128, 64, 32)  # group sizes that the kernels of vLLM and SGLang take, and ours
OTHER_GROUPS = (16, 48, 96, 192, 256, 512, 1024)
_EMBEDDING = re.compile(r"(embed|wte|wpe)[^.]*$")


@dataclass(frozen=True)
class LayerPlan:
    """One linear to quantize.

    name: as on disk, without `.weight`. shape: (N, K), whatever the layout on disk. transposed: on disk it is Conv1D's
    [K, N]. block: number of its decoder block, None outside of them. input_range: how a calibrated range of inputs is
    chosen. renamed: the model's name of the module where it is another one than on disk. split: the model's modules, in
    the order of their rows, where it is several.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    block: int | None
    scheme: Scheme
    algorithm: AlgorithmConfig
    input_range: InputRange = "minmax"
    renamed: str | None = None
    split: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The module's name in transformers' model; the first one's of several."""
        return self.name if self.renamed is None else self.renamed

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of all its modules in transformers' model."""
        return self.split or (self.module,)

    @property
    def calibrates_inputs(self) -> bool:
        """Whether its inputs have one scale, found on calibration text."""
        return self.scheme.inputs is not None and not self.scheme.inputs.dynamic


@dataclass(frozen=True, eq=False)
class Plan:
    """blocks_prefix: module name of the block list, as on disk while the model is not built. skipped: (name, reason) of
    weights left as they are. kv: how the KV cache is quantized; None: it is exact. kv_followed: whether what comes
    behind a block is calibrated with its cache rounded. widest: rows or columns of the largest weight in a block.
    parts: tensor on disk -> number of its decoder block, for all tensors in one.
    """

    blocks_prefix: str
    n_blocks: int
    layers: tuple[LayerPlan, ...]
    skipped: tuple[tuple[str, str], ...]
    kv: KVScheme | None = None
    kv_followed: bool = True
    widest: int = 1
    parts: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def kinds(self) -> tuple[LayerPlan, ...]:
        """One linear for each combination of shape, scheme and algorithm: a mixture has thousands alike."""
        return tuple({(one.shape, id(one.scheme), id(one.algorithm)): one for one in self.layers}.values())

    @property
    def calibrates_cache(self) -> bool:
        """Whether the KV cache has stored scales, found on calibration text."""
        return self.kv is not None and not self.kv.dynamic

    @property
    def follows_quantized(self) -> bool:
        """Whether calibration carries the hidden states behind the quantized layers, for all windows.

        GPTQ compensates for what was quantized before; the scales of a cache and of inputs are those of the model that
        will run; and whatever is measured of rounded inputs is measured behind rounded inputs.
        """
        return self.calibrates_cache or self.weights_follow

    @property
    def weights_follow(self) -> bool:
        """Whether the quantized weights themselves depend on those states."""
        needs = frozenset().union(*(layer.algorithm.needs for layer in self.kinds))
        rounded = any(layer.scheme.inputs for layer in self.kinds)
        static = any(layer.calibrates_inputs for layer in self.kinds)
        behind = "hessian" in needs and not self.on_original
        return behind or static or bool(needs and rounded)

    @property
    def on_original(self) -> bool:
        """Whether GPTQ's Hessians are those of the original model's inputs."""
        return any(getattr(layer.algorithm, "stream", None) == "original" for layer in self.kinds)

    def needs_text(self, recipe: Recipe) -> bool:
        """Whether calibration text is run through the model: for a transform, for statistics of an algorithm, or for
        calibrated scales of inputs or of the cache.
        """
        if recipe.transforms or self.calibrates_cache:
            return True
        return any(layer.algorithm.needs or layer.calibrates_inputs for layer in self.kinds)


@dataclass(frozen=True)
class _Linear:
    """A weight that could be quantized. aside: why it is not, unless a rule names it; None: it is."""

    name: str
    renamed: str | None
    shape: tuple[int, int]
    transposed: bool
    block: int | None
    aside: str | None
    split: tuple[str, ...] = ()


def build_plan(recipe: Recipe, headers: Headers, places: Places | None = None) -> Plan:
    """The plan, or one error with every problem: rules that do not fit, group sizes, windows that are too long.

    places: where each tensor goes in the model; None while it is not built. RecipeError, or ModelError if only the
    model's shapes are in the way.
    """
    if recipe.model_free:
        found = find_linears(headers)
        blocks, refused = found.blocks, dict(found.refused)
        linears = [
            _Linear(each.name, None, each.shape, each.transposed, each.block, each.left)
            for each in found.linears
        ]
    else:
        blocks = _blocks(headers, places)
        linears, refused = _linears(headers, blocks, places)
    problems, only_ordinary = [], []
    for number, rule in enumerate(recipe.rules):
        only_ordinary.append(any(rule.fits(linear.name) for linear in linears if linear.aside is None))
        problem = None if only_ordinary[-1] else _outside_problem(rule, linears, refused, headers)
        if problem:
            problems.append(f"rules.{number}: {problem}")
    layers: list[LayerPlan] = []
    choices: dict[int | None, _Choice] = {}
    skipped = list(refused.items())
    for linear in linears:
        last: Rule | None = None
        which: int | None = None
        for each, (rule, ordinary) in enumerate(zip(recipe.rules, only_ordinary, strict=True)):
            if rule.fits(linear.name) and (linear.aside is None or not ordinary):
                last, which = rule, each
        if last is not None and last.skip:
            skipped.append((linear.name, f"rule {last.match!r}"))
        elif last is None and linear.aside is not None:
            skipped.append((linear.name, linear.aside))
        elif recipe.weights is None:
            skipped.append((linear.name, "weights: none"))
        else:
            if which not in choices:
                choices[which] = _choice(recipe, recipe.weights, last)
            layers.append(_layer(linear, choices[which]))
    if not recipe.output.allow_split_fusion:
        problems += _split_fusions(layers, [each for each in skipped if each[0] not in refused])
    kv = None if recipe.kv_cache is None else recipe.kv_cache.scheme
    widest = max((max(linear.shape) for linear in linears if linear.block is not None), default=1)
    followed = recipe.kv_cache is None or recipe.kv_cache.followed is not False
    plan = Plan(blocks.prefix, blocks.count, tuple(layers), tuple(skipped), kv, followed, widest, blocks.of)
    problems += _window_problems(recipe, plan, headers)
    if not layers and recipe.weights is not None and not problems:
        problems.append("the rules skip every linear; nothing is left to quantize")
    groups = _group_problems(layers)
    if problems:
        raise RecipeError("\n".join([*problems, *groups]))
    if groups:
        raise ModelError("\n".join(groups))
    return plan


def _blocks(headers: Headers, places: Places | None) -> Blocks:
    """The decoder blocks: of the model, or by names while it is not built."""
    if places is None:
        return find_blocks(headers.path, headers.config, headers.tensors)
    numbers = {disk: places.block_of(disk) for disk in places.by_disk}
    of = {disk: number for disk, number in numbers.items() if number is not None}
    return Blocks(places.blocks, places.n_blocks, of)


_Choice = tuple[Scheme, AlgorithmConfig, InputRange]  # what all linears of one rule get: the same objects


def _choice(recipe: Recipe, weights: Weights, rule: Rule | None) -> _Choice:
    inputs, algorithm = recipe.inputs, weights.algorithm
    if rule:
        scheme, algorithm = rule.apply(weights, inputs)
        inputs = rule.inputs_instead_of(inputs)
    else:
        scheme = Scheme(weights.scheme.weights, None if inputs is None else inputs.grid)
    return scheme, algorithm, "minmax" if inputs is None else inputs.range


def _layer(linear: _Linear, choice: _Choice) -> LayerPlan:
    scheme, algorithm, input_range = choice
    return LayerPlan(
        name=linear.name,
        shape=linear.shape,
        transposed=linear.transposed,
        block=linear.block,
        scheme=scheme,
        algorithm=algorithm,
        input_range=input_range,
        renamed=linear.renamed,
        split=linear.split,
    )


def _linears(headers: Headers, blocks: Blocks, places: Places | None) -> tuple[list[_Linear], dict[str, str]]:
    """(weights that can be quantized, name -> why another matrix cannot be)."""
    linears: list[_Linear] = []
    refused: dict[str, str] = {}
    conv1d = families.family(headers.text_type).conv1d
    for disk, tensor in headers.tensors.items():
        name, _, leaf = disk.rpartition(".")
        if leaf != "weight" or len(tensor.shape) != 2 or disk in headers.dropped:
            continue
        place = None if places is None else places.by_disk.get(disk)
        if disk not in blocks.of:
            table = _EMBEDDING.search(name) or (place is not None and place.kind == "embedding")
            if table or (headers.tied and families.is_head(name)):
                continue
        if reason := _refused(disk, tensor.shape[0], disk in blocks.of, places):
            refused[name] = reason
            continue
        module = (place.parameter if place else None) or disk
        module = module.removesuffix(".weight")
        transposed = name.rpartition(".")[2] in conv1d if place is None else place.owner == "Conv1D"
        rows, columns = tensor.shape
        shape = (columns, rows) if transposed else (rows, columns)
        aside = families.set_aside(name) or (None if module == name else families.set_aside(module))
        if disk not in blocks.of:
            aside = "outside the decoder blocks"
        renamed = None if module == name else module
        split = tuple(weight.removesuffix(".weight") for weight, _ in place.split) if place else ()
        linears.append(_Linear(name, renamed, shape, transposed, blocks.of.get(disk), aside, split))
    linears.sort(key=lambda linear: (linear.block is None, linear.block or 0))
    return linears, refused


def _refused(disk: str, rows: int, in_block: bool, places: Places | None) -> str | None:
    """Why a matrix cannot be quantized, or None. rows: how many it has on disk."""
    if places is None:
        if in_block:
            return None
        part = families.tower(disk)
        return f"part of {part}, carried as it is" if part else _extra(disk)
    place = places.by_disk[disk]
    if place.parameter is None:
        return _extra(disk) or "no part of the model that transformers builds, carried as it is"
    if not places.in_text(place.parameter):
        return "no part of the language model, carried as it is"
    if not place.whole and (not place.split or sum(own for _, own in place.split) != rows):
        return "a part of a parameter that transformers assembles"
    return None if place.kind in ("linear", "router") else f"a {place.owner}, not a linear layer"


def _extra(disk: str) -> str | None:
    """Why a tensor is carried by its name, or None."""
    mtp = families.MTP.search(disk) or families.MTP_BLOCK.search(disk)
    return "predicts further tokens (MTP), carried as it is" if mtp else None


def _outside_problem(
    rule: Rule, linears: Sequence[_Linear], refused: Mapping[str, str], headers: Headers
) -> str | None:
    """What is wrong with a rule that fits no ordinary linear of the blocks."""
    head = next((name for name in _heads(headers) if rule.fits(name)), None)
    if headers.tied and head:
        if rule.skip:
            return None
        return (
            f"{rule.match!r} fits {head}, which shares its weight with the input embeddings "
            "(tie_word_embeddings); quantizing it would change both, so remove the rule"
        )
    if any(rule.fits(linear.name) for linear in linears):
        return None
    fitting = [name for name in refused if rule.fits(name)]
    if fitting:
        return (
            None
            if rule.skip
            else f"{rule.match!r} fits {starred(fitting[0])}, {refused[fitting[0]]}; remove the rule"
        )
    example = ", ".join(dict.fromkeys(starred(linear.name) for linear in linears))
    return f"{rule.match!r} fits no linear of this model; its linears are {example}"


def _heads(headers: Headers) -> list[str]:
    """Names of the output head: as on disk, or `lm_head` where a tied one is not stored."""
    names = (name.rpartition(".")[0] for name in headers.tensors if name.endswith(".weight"))
    return [name for name in names if families.is_head(name)] or ["lm_head"]


def _split_fusions(layers: Sequence[LayerPlan], skipped: Sequence[tuple[str, str]]) -> list[str]:
    """One problem per set of siblings that engines fuse into one linear and that got different schemes."""
    schemes: dict[str, Scheme | None] = {layer.name: layer.scheme for layer in layers}
    schemes |= dict.fromkeys((name for name, _ in skipped), None)
    found: dict[str, None] = {}
    seen: set[tuple[str, int]] = set()
    for name in schemes:
        parent, _, leaf = name.rpartition(".")
        for which, members in enumerate(families.SIBLINGS):
            if leaf not in members or (parent, which) in seen:
                continue
            seen.add((parent, which))
            here = {m: schemes[f"{parent}.{m}"] for m in sorted(members) if f"{parent}.{m}" in schemes}
            if len(set(here.values())) > 1:
                told = ", ".join(f"{member} {scheme or 'skipped'}" for member, scheme in here.items())
                found[
                    f"{starred(parent)}: {told}: inference engines fuse these and need one scheme; let "
                    "the rules cover all of them, or set output.allow_split_fusion: true"
                ] = None
    return list(found)


def _window_problems(recipe: Recipe, plan: Plan, headers: Headers) -> list[str]:
    """The problem, if calibration windows are longer than the model's positions."""
    length, longest = recipe.calibration.sequence_length, headers.positions
    if longest is None or length <= longest or not plan.needs_text(recipe):
        return []
    return [
        f"calibration.sequence_length: windows of {length} tokens, but the model has only {longest} positions "
        f"(config.json); use --set calibration.sequence_length={longest} or less"
    ]


def _group_problems(layers: Sequence[LayerPlan]) -> list[str]:
    """One problem for every kind of layer whose in_features are not whole groups of weights or of inputs."""
    bad: dict[tuple[str, int, Grid, bool], int] = {}
    for layer in layers:
        for grid in (layer.scheme.weights, layer.scheme.inputs):
            if grid is not None and not grid.divides(layer.shape[1]):
                fixed = grid.number.kind != "int" or grid is layer.scheme.inputs
                key = (starred(layer.name), layer.shape[1], grid, fixed)
                bad[key] = bad.get(key, 0) + 1
    return [
        f"in_features={k} is not divisible by group_size={grid.group(k)} in {name} ({count} of them); use "
        f"{'another preset' if fixed else _fitting_groups(k)}, or a rule {{match: '{name}', skip: true}}"
        for (name, k, grid, fixed), count in bad.items()
    ]


def _fitting_groups(columns: int) -> str:
    """The group sizes that divide a row: those with kernels in engines, or else any."""
    sizes = [g for g in ENGINE_GROUPS if columns % g == 0] or [g for g in OTHER_GROUPS if columns % g == 0]
    return f"group_size {', '.join([*map(str, sizes), 'channel'])}"


def starred(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
