"""What a recipe does to every linear of a checkpoint, decided from the headers of its files.

No weight is read, and torch is not imported, so that `quantkit validate --model` answers at once. Headers know names
and shapes, not what a module is: a 2-D `.weight` may also be a router or a table. `quantize` therefore plans again
when it has built the empty model, with the types of the modules (`others`). Until then, and for linears that must not
be rounded although they are linears, `families.SET_ASIDE` says which names are left as they are.

What lies outside the numbered decoder blocks (an output head, a projection) stays as it is, too, unless a rule names
it and names no ordinary linear of the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.algorithms.config import AlgorithmConfig
from quantkit.errors import ModelError, RecipeError
from quantkit.models import families
from quantkit.models.headers import Headers
from quantkit.models.tensors import TensorInfo
from quantkit.recipe import Recipe
from quantkit.recipe_schemes import InputRange, Rule, Weights
from quantkit.scheme import Grid, KVScheme, Scheme

ENGINE_GROUPS = (128, 64, 32)  # group sizes that the kernels of vLLM and SGLang take, and ours
OTHER_GROUPS = (16, 48, 96, 192, 256, 512, 1024)
_NUMBERED = re.compile(r"^(?:(.+?)\.)?(\d+)\..+$")  # (block list, number), the leftmost number counts
_EMBEDDING = re.compile(r"(embed|wte|wpe)[^.]*$")


@dataclass(frozen=True)
class LayerPlan:
    """One linear to quantize.

    name: module name. shape: (N, K), whatever the layout on disk. transposed: on disk it is Conv1D's [K, N].
    block: number of its decoder block, None outside of them. input_range: how a calibrated range of inputs is chosen.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    block: int | None
    scheme: Scheme
    algorithm: AlgorithmConfig
    input_range: InputRange = "minmax"

    @property
    def calibrates_inputs(self) -> bool:
        """Whether its inputs have one scale, found on calibration text."""
        return self.scheme.inputs is not None and not self.scheme.inputs.dynamic


@dataclass(frozen=True)
class Plan:
    """blocks_prefix: module name of the block list. skipped: (module, reason) of weights left as they are.

    kv: how the KV cache is quantized; None: it is exact. widest: rows or columns of the largest weight in a block.
    """

    blocks_prefix: str
    n_blocks: int
    layers: tuple[LayerPlan, ...]
    skipped: tuple[tuple[str, str], ...]
    kv: KVScheme | None = None
    widest: int = 1

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
        needs = frozenset().union(*(layer.algorithm.needs for layer in self.layers))
        rounded = any(layer.scheme.inputs for layer in self.layers)
        static = any(layer.calibrates_inputs for layer in self.layers)
        return "hessian" in needs or self.calibrates_cache or static or bool(needs and rounded)

    def needs_text(self, recipe: Recipe) -> bool:
        """Whether calibration text is run through the model: for a transform, for statistics of an algorithm, or for
        calibrated scales of inputs or of the cache.
        """
        if recipe.transforms or self.calibrates_cache:
            return True
        return any(layer.algorithm.needs or layer.calibrates_inputs for layer in self.layers)


@dataclass(frozen=True)
class _Linear:
    """A weight that could be quantized. aside: why it is not, unless a rule names it; None: it is."""

    name: str
    shape: tuple[int, int]
    transposed: bool
    block: int | None
    aside: str | None


def build_plan(recipe: Recipe, headers: Headers, others: Mapping[str, str] | None = None) -> Plan:
    """The plan, or one error with every problem: rules that do not fit, group sizes, windows that are too long.

    others: module name -> class name of every module of the built model that is not a linear layer; None while the
    model is not built. RecipeError, or ModelError if only the model's shapes are in the way.
    """
    prefix, n_blocks, linears, refused = _linears(headers, others or {})
    problems, only_ordinary = [], []
    for number, rule in enumerate(recipe.rules):
        only_ordinary.append(any(rule.fits(linear.name) for linear in linears if linear.aside is None))
        problem = None if only_ordinary[-1] else _outside_problem(rule, linears, refused, headers)
        if problem:
            problems.append(f"rules.{number}: {problem}")
    layers: list[LayerPlan] = []
    skipped = list(refused.items())
    for linear in linears:
        last = None
        for rule, ordinary in zip(recipe.rules, only_ordinary, strict=True):
            if rule.fits(linear.name) and (linear.aside is None or not ordinary):
                last = rule
        if last is not None and last.skip:
            skipped.append((linear.name, f"rule {last.match!r}"))
        elif last is None and linear.aside is not None:
            skipped.append((linear.name, linear.aside))
        elif recipe.weights is None:
            skipped.append((linear.name, "weights: none"))
        else:
            layers.append(_layer(linear, recipe, recipe.weights, last))
    if not recipe.output.allow_split_fusion:
        problems += _split_fusions(layers, skipped)
    kv = None if recipe.kv_cache is None else recipe.kv_cache.scheme
    widest = max((max(linear.shape) for linear in linears if linear.block is not None), default=1)
    plan = Plan(prefix, n_blocks, tuple(layers), tuple(skipped), kv, widest)
    problems += _window_problems(recipe, plan, headers)
    if not layers and recipe.weights is not None and not problems:
        problems.append("the rules skip every linear; nothing is left to quantize")
    groups = _group_problems(layers)
    if problems:
        raise RecipeError("\n".join([*problems, *groups]))
    if groups:
        raise ModelError("\n".join(groups))
    return plan


def _layer(linear: _Linear, recipe: Recipe, weights: Weights, rule: Rule | None) -> LayerPlan:
    inputs, algorithm = recipe.inputs, weights.algorithm
    if rule:
        scheme, algorithm = rule.apply(weights, inputs)
        inputs = rule.inputs_instead_of(inputs)
    else:
        scheme = Scheme(weights.scheme.weights, None if inputs is None else inputs.grid)
    return LayerPlan(
        name=linear.name,
        shape=linear.shape,
        transposed=linear.transposed,
        block=linear.block,
        scheme=scheme,
        algorithm=algorithm,
        input_range="minmax" if inputs is None else inputs.range,
    )


def _linears(headers: Headers, others: Mapping[str, str]) -> tuple[str, int, list[_Linear], dict[str, str]]:
    """(module name of the block list, number of blocks, weights that can be quantized, module -> why not)."""
    matrices: dict[str, TensorInfo] = {}
    for disk_name, tensor in headers.tensors.items():
        name, _, leaf = headers.module_names[disk_name].rpartition(".")
        if leaf == "weight" and len(tensor.shape) == 2 and disk_name not in headers.dropped:
            matrices[name] = tensor
    prefix, blocks = _blocks(headers, matrices)
    linears: list[_Linear] = []
    refused: dict[str, str] = {}
    for name, tensor in matrices.items():
        is_tied_head = headers.tied and name == families.HEAD
        if name not in blocks and (is_tied_head or _EMBEDDING.search(name)):
            continue
        if name in others:
            refused[name] = f"a {others[name]}, not a linear layer"
            continue
        transposed = families.is_conv1d(headers.model_type, name)
        rows, columns = tensor.shape
        shape = (columns, rows) if transposed else (rows, columns)
        aside = families.set_aside(name) if name in blocks else "outside the decoder blocks"
        linears.append(_Linear(name, shape, transposed, blocks.get(name), aside))
    linears.sort(key=lambda linear: (linear.block is None, linear.block or 0))
    return prefix, max(blocks.values()) + 1, linears, refused


def _blocks(headers: Headers, matrices: Mapping[str, TensorInfo]) -> tuple[str, dict[str, int]]:
    """(module name of the block list, {module in it: its block's number}); the list with most bytes is meant."""
    numbered = {name: match for name in matrices if (match := _NUMBERED.match(name))}
    sizes: dict[str, int] = {}
    for name, match in numbered.items():
        sizes[match[1] or ""] = sizes.get(match[1] or "", 0) + matrices[name].nbytes
    if not sizes:
        raise ModelError(
            f"{headers.path}: no numbered decoder blocks among {len(headers.tensors)} tensors; "
            "only causal language models with a list of decoder blocks can be quantized"
        )
    prefix = max(sizes, key=sizes.__getitem__)
    blocks = {name: int(match[2]) for name, match in numbered.items() if (match[1] or "") == prefix}
    numbers = sorted(set(blocks.values()))
    if numbers[-1] >= len(numbers):  # compared before anything counts that far: the number may be absurd
        first = next(i for i, number in enumerate(numbers) if number != i)
        raise ModelError(
            f"{headers.path}: {prefix} has blocks up to {numbers[-1]} but none numbered {first}; the checkpoint "
            "is incomplete, fetch it again"
        )
    return prefix, blocks


def _outside_problem(
    rule: Rule, linears: Sequence[_Linear], refused: Mapping[str, str], headers: Headers
) -> str | None:
    """What is wrong with a rule that fits no ordinary linear of the blocks."""
    if headers.tied and rule.fits(families.HEAD):
        if rule.skip:
            return None
        return (
            f"{rule.match!r} fits {families.HEAD}, which shares its weight with the input embeddings "
            "(tie_word_embeddings); quantizing it would change both, so remove the rule"
        )
    if any(rule.fits(linear.name) for linear in linears):
        return None
    fitting = [name for name in refused if rule.fits(name)]
    if fitting:
        return (
            None
            if rule.skip
            else f"{rule.match!r} fits {_starred(fitting[0])}, {refused[fitting[0]]}; remove the rule"
        )
    example = ", ".join(dict.fromkeys(_starred(linear.name) for linear in linears))
    return f"{rule.match!r} fits no linear of this model; its linears are {example}"


def _split_fusions(layers: Sequence[LayerPlan], skipped: Sequence[tuple[str, str]]) -> list[str]:
    """One problem per set of siblings that engines fuse into one linear and that got different schemes."""
    schemes: dict[str, Scheme | None] = {layer.name: layer.scheme for layer in layers}
    schemes |= dict.fromkeys((name for name, _ in skipped), None)
    found: dict[str, None] = {}
    for name in schemes:
        parent, _, leaf = name.rpartition(".")
        for members in families.SIBLINGS:
            if leaf not in members:
                continue
            here = {m: schemes[f"{parent}.{m}"] for m in sorted(members) if f"{parent}.{m}" in schemes}
            if len(set(here.values())) > 1:
                told = ", ".join(f"{member} {scheme or 'skipped'}" for member, scheme in here.items())
                found[
                    f"{_starred(parent)}: {told}: inference engines fuse these and need one scheme; let "
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
                key = (_starred(layer.name), layer.shape[1], grid, fixed)
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


def _starred(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
