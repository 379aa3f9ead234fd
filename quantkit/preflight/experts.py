"""Experts of a mixture in plain transformers, which makes one dense tensor per layer of them while it loads a model.

Seen with transformers 5.23 and compressed-tensors 0.20 (tests/checkpoint/test_plain_experts.py): that works for one
scheme of symmetric integers, FP8 or MXFP4 in all experts. What does not, mostly ends in a model that is wrong, and
nothing says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence, Set

from quantkit.preflight.subject import Finding, Linear, Subject, gathered
from quantkit.preflight.tables import STACKED, UNROLLED
from quantkit.scheme import Scheme

_OWN = re.compile(r"^(.*\.experts|.*\.(?:in|out)put_linear)\.\d+(?:\.|$)")
_STACK = re.compile(r"\.experts\.gate_up_proj$")
_RANDOM = "it has random experts then, without an error"
_ERROR = "RuntimeError while it loads"


def experts_there(subject: Subject, where: str) -> Iterator[Finding]:
    """What is wrong with a checkpoint's experts in plain transformers. where: the version that was looked at."""
    own = [
        linear for linear in subject.linears if _OWN.match(linear.name) and not subject.of_mtp(linear.name)
    ]
    apart = {_holder(linear.name) for linear in own}
    stacks = {_holder(name) for name in subject.names if _STACK.search(name)} - apart
    numbers = _wrong(subject, own, stacks)
    if numbers is not None:
        finding = Finding("experts", "", numbers, "use quantkit.load, or serve it with vLLM", where)
        yield from gathered([(name, finding) for name in sorted(apart | stacks)])


def gathers(subject: Subject, linears: Iterable[Linear]) -> bool:
    """Whether some of these linears are experts that it makes one dense tensor of."""
    return not _types(subject) & (STACKED | UNROLLED) and any(_OWN.match(linear.name) for linear in linears)


def _types(subject: Subject) -> set[str]:
    """The model type, and that of the language model inside."""
    return {subject.model_type, str(subject.text.get("model_type", ""))}


def _holder(name: str) -> str:
    """The module that holds experts, by the name of one of its tensors or linears."""
    match = _OWN.match(name)
    return match[1] if match else f"{name.rpartition('.experts.')[0]}.experts"


def _wrong(subject: Subject, own: Sequence[Linear], stacks: Set[str]) -> str | None:
    """What is wrong, None if nothing is known to be. own: experts as linears; stacks: modules without any."""
    types = _types(subject)
    kinds = {linear.scheme for linear in own}
    packed = {kind for kind in kinds if kind is not None}
    if types & UNROLLED:
        left = subject.quantized and stacks
        return f"stacked and not quantized, and it looks for linears: {_RANDOM}" if left else None
    if types & STACKED:
        return f"linears, and it looks for the stacked ones of this family: {_RANDOM}" if packed else None
    if not own or not subject.quantized:
        return None
    if kinds != packed:
        return (
            f"{'some' if packed else 'all'} not quantized, whose weights it takes for packed ones: {_ERROR}"
        )
    if len(packed) > 1:
        told = ", ".join(sorted(map(str, packed))[:4])
        return f"{told}: it decodes all experts by one scheme, and the model is wrong without an error"
    return _unread(packed.pop())


def _unread(scheme: Scheme) -> str | None:
    """What is wrong with the one scheme of all experts."""
    grid = scheme.weights
    if grid.number.name == "fp4_e2m1" and grid.scale == "fp8_e4m3":
        return (
            f"{scheme}: it leaves out the scale of the whole weight, and the model is wrong without an error"
        )
    if not grid.symmetric:
        return f"{scheme}: it does not gather zero points, {_ERROR}"
    if grid.number.kind == "int" and scheme.inputs is not None:
        return f"{scheme}: it does not gather integer weights whose inputs are rounded, {_ERROR}"
    if grid.number.name == "fp8_e4m3" and grid.scale is not None:
        return f"{scheme}: it does not gather FP8 weights with such scales, {_ERROR}"
    return None
