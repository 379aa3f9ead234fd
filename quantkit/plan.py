"""Recipe + checkpoint headers -> what happens to every linear; no weight is read, torch is not needed.

The linears are the 2-D `.weight` tensors inside the numbered list of decoder blocks. What lies outside (an
output head, a projection) stays as it is unless a rule fits it and fits no linear of the blocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.errors import ModelError, RecipeError
from quantkit.models import families
from quantkit.models.headers import Headers
from quantkit.recipe import AlgorithmConfig, Recipe, Rule
from quantkit.scheme import Scheme

ENGINE_GROUPS = (128, 64, 32)  # group sizes that the kernels of vLLM and SGLang take, and ours
OTHER_GROUPS = (16, 48, 96, 192, 256, 512, 1024)
_NUMBERED = re.compile(r"^(?:(.+?)\.)?(\d+)\..+$")  # (block list, number), the leftmost number counts
_EMBEDDING = re.compile(r"(embed|wte|wpe)[^.]*$")


@dataclass(frozen=True)
class LayerPlan:
    """One linear to quantize.

    name: module name. shape: (N, K), whatever the layout on disk. transposed: on disk it is Conv1D's [K, N].
    block: number of its decoder block, None outside of them.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    block: int | None
    scheme: Scheme
    algorithm: AlgorithmConfig


@dataclass(frozen=True)
class Plan:
    """blocks_prefix: module name of the block list. skipped: linears left as they are, with the reason."""

    blocks_prefix: str
    n_blocks: int
    layers: tuple[LayerPlan, ...]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Linear:
    name: str
    shape: tuple[int, int]
    transposed: bool
    block: int | None


def build_plan(recipe: Recipe, headers: Headers) -> Plan:
    """The plan, or one error with every rule that does not fit and every layer that cannot be quantized.

    RecipeError if a rule is wrong, ModelError if only the model's shapes do not fit the group size.
    """
    prefix, n_blocks, linears = _linears(headers)
    inside = [linear for linear in linears if linear.block is not None]
    problems = []
    about_blocks = []
    for number, rule in enumerate(recipe.rules):
        about_blocks.append(any(rule.fits(linear.name) for linear in inside))
        if not about_blocks[-1]:
            problem = _outside_problem(rule, linears, headers)
            if problem:
                problems.append(f"rules.{number}: {problem}")
    layers, skipped = [], []
    for linear in linears:
        last = None
        for rule, only_blocks in zip(recipe.rules, about_blocks, strict=True):
            if rule.fits(linear.name) and (linear.block is not None or not only_blocks):
                last = rule
        if last is not None and last.skip:
            skipped.append((linear.name, f"rule {last.match!r}"))
        elif last is None and linear.block is None:
            skipped.append((linear.name, "outside the decoder blocks"))
        else:
            weights = recipe.weights
            scheme, algorithm = last.apply(weights) if last else (weights.scheme, weights.algorithm)
            layers.append(LayerPlan(**vars(linear), scheme=scheme, algorithm=algorithm))
    if not recipe.output.allow_split_fusion:
        problems += _split_fusions(layers, skipped)
    undivided = _undivided(layers)
    if not layers:
        problems.append("the rules skip every linear; nothing is left to quantize")
    if problems:
        raise RecipeError("\n".join(problems + undivided))
    if undivided:
        raise ModelError("\n".join(undivided))
    return Plan(prefix, n_blocks, tuple(layers), tuple(skipped))


def _linears(headers: Headers) -> tuple[str, int, list[_Linear]]:
    """(module name of the block list, number of blocks, every linear inside it and outside of it)."""
    matrices = {}
    for disk_name, tensor in headers.tensors.items():
        name, _, leaf = headers.module_names[disk_name].rpartition(".")
        if leaf == "weight" and len(tensor.shape) == 2 and disk_name not in headers.dropped:
            matrices[name] = tensor
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
    n_blocks = numbers[-1] + 1
    if n_blocks > len(numbers):  # compared before anything counts up to n_blocks, which may be absurd
        first = next(i for i, number in enumerate(numbers) if number != i)
        raise ModelError(
            f"{headers.path}: {prefix} has blocks up to {numbers[-1]} but none numbered {first}; the checkpoint "
            "is incomplete, fetch it again"
        )
    linears = []
    for name, tensor in matrices.items():
        is_tied_head = headers.tied and name == families.HEAD
        if name in blocks or not (is_tied_head or _EMBEDDING.search(name)):
            transposed = families.is_conv1d(headers.model_type, name)
            shape = tensor.shape[::-1] if transposed else tensor.shape
            linears.append(_Linear(name, shape, transposed, blocks.get(name)))
    linears.sort(key=lambda linear: (linear.block is None, linear.block or 0))
    return prefix, n_blocks, linears


def _outside_problem(rule: Rule, linears: list[_Linear], headers: Headers) -> str | None:
    """What is wrong with a rule that fits no linear of the blocks."""
    if headers.tied and rule.fits(families.HEAD):
        if rule.skip:
            return None
        return (
            f"{rule.match!r} fits {families.HEAD}, which shares its weight with the input embeddings "
            "(tie_word_embeddings); quantizing it would change both, so remove the rule"
        )
    if any(rule.fits(linear.name) for linear in linears):
        return None
    example = ", ".join(dict.fromkeys(_starred(linear.name) for linear in linears))
    return f"{rule.match!r} fits no linear of this model; its linears are {example}"


def _split_fusions(layers: Sequence[LayerPlan], skipped: Sequence[tuple[str, str]]) -> list[str]:
    """One problem per set of siblings that engines fuse into one and that got different schemes."""
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


def _undivided(layers: Sequence[LayerPlan]) -> list[str]:
    """One problem per kind of layer whose in_features the group size does not divide."""
    bad: dict[tuple[str, int, int], int] = {}
    for layer in layers:
        grid = layer.scheme.weights
        if not grid.divides(layer.shape[1]):
            key = (_starred(layer.name), layer.shape[1], grid.group(layer.shape[1]))
            bad[key] = bad.get(key, 0) + 1
    lines = []
    for (name, k, group), count in bad.items():
        fitting = [g for g in ENGINE_GROUPS if k % g == 0] or [g for g in OTHER_GROUPS if k % g == 0]
        lines.append(
            f"in_features={k} is not divisible by group_size={group} in {name} ({count} of them); use "
            f"group_size {''.join(f'{g}, ' for g in fitting)}channel, or a rule {{match: '{name}', skip: true}}"
        )
    return lines


def _starred(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
