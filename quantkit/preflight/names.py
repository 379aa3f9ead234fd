"""Whether an engine, reading `quantization_config`, finds for every linear the scheme it is stored in.

vLLM asks for a fused linear (qkv_proj) whether each of its parts is ignored, and which target fits each: its
layers/quantization/compressed_tensors/utils.py. Names and patterns are those of the file, translated for wrappers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from quantkit.formats.expert_names import asked, holders
from quantkit.formats.patterns import PatternError, matches
from quantkit.preflight.foreign import format_of
from quantkit.preflight.subject import EMBEDDING, HEAD, Finding, Linear, Subject
from quantkit.preflight.tables import FUSIONS, RENAMED, Fusion, source
from quantkit.preflight.target import NAMES, Target

_UTILS = "model_executor/layers/quantization/compressed_tensors/utils.py"
_EXPERTS = (
    "model_executor/layers/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe.py"
)


def fusions_of(subject: Subject) -> list[Fusion]:
    """The fusions that hold for a model type; one that names the type wins over a general one of the same parts."""
    own = [fusion for fusion in FUSIONS if subject.model_type in fusion.types]
    return own + [fusion for fusion in FUSIONS if not fusion.types]


def siblings(subject: Subject, target: Target) -> Iterator[tuple[str, Finding]]:
    """(module that holds them, what is wrong): linears that engines fuse and that have different schemes."""
    groups: dict[str, dict[str, Linear]] = {}
    for linear in subject.linears:
        groups.setdefault(linear.parent, {})[linear.leaf] = linear
    for parent, members in groups.items():
        for fusion in fusions_of(subject):
            parts = [members[leaf] for leaf in fusion.parts if leaf in members]
            if len(parts) > 1 and len({part.scheme for part in parts}) > 1:
                told = ", ".join(f"{part.leaf} {part.scheme or 'not quantized'}" for part in parts)
                numbers = (
                    f"{told}: {NAMES[target.engine]} holds them as one {fusion.fused}, which has one scheme"
                )
                remedy = "let the rules cover all of them"
                if any(
                    part.scheme is None for part in parts
                ):  # maybe without a place in the model, so carried
                    packed = ", ".join(part.leaf for part in parts if part.scheme is not None)
                    remedy += f", or skip {packed} there"
                where = source(target.engine, fusion.file)
                yield parent, Finding("siblings", "", numbers, remedy, where)
    yield from _experts(subject, target)


def _experts(subject: Subject, target: Target) -> Iterator[tuple[str, Finding]]:
    """Experts of one layer with different schemes: the engine takes that of the first for all."""
    layers: dict[str, set[object]] = {}
    for linear in subject.linears:
        before, inside, _ = linear.name.partition(".experts.")
        if inside:
            layers.setdefault(before, set()).add(linear.scheme)
    for name, kinds in layers.items():
        if len(kinds) > 1:
            told = ", ".join(sorted(str(kind or "not quantized") for kind in kinds))
            numbers = (
                f"{told} among the experts of one layer: the engine takes the scheme of the first for all"
            )
            where = source(target.engine, _EXPERTS)
            yield f"{name}.experts", Finding("siblings", "", numbers, "give all experts one scheme", where)


def spelled(subject: Subject, target: Target) -> Iterator[tuple[str, Finding]]:
    """(linear, what is wrong): `ignore` and `targets` give it another verdict than the file's tensors."""
    groups = subject.quantization.get("config_groups")  # ModelOpt's look alike and mean other patterns
    if not isinstance(groups, Mapping) or not groups or format_of(subject) is not None:
        return
    renamed, file = RENAMED.get(subject.model_type, ((), _UTILS))
    ignore = _Names(_texts(subject.quantization.get("ignore")), renamed)
    written = [
        t for group in groups.values() if isinstance(group, Mapping) for t in _texts(group.get("targets"))
    ]
    targets = _Names(written, renamed)
    for linear in [*subject.linears, *(_asked(subject) if target.engine == "vllm" else ())]:
        if EMBEDDING.search(linear.name):
            continue
        there = _translated(linear.name, renamed)
        left, chosen = ignore.fitting(there), targets.fitting(there)
        if chosen is None and "Linear" in written and not HEAD.search(linear.name):
            chosen = "Linear"
        problem = _problem(linear, there, left, chosen, ignore)
        if problem:
            yield linear.name, Finding("names", "", *problem, source(target.engine, file))


def _asked(subject: Subject) -> Iterator[Linear]:
    """The first expert of each layer under the names that vLLM asks for; none where a layer has several schemes."""
    known = {linear.name for linear in subject.linears}
    kinds: dict[str, set[Linear]] = {}
    for linear in subject.linears:
        for holder in holders([linear.name]):
            kinds.setdefault(holder, set()).add(linear)
    for members in kinds.values():
        first = min(members, key=lambda linear: linear.name)
        if len({linear.scheme for linear in members}) == 1:
            yield from (replace(first, name=name) for name in asked([first.name]) if name not in known)


class _Names:
    """Names and patterns of a config as the engine understands them."""

    def __init__(self, written: Sequence[str], renamed: Sequence[tuple[str, str]]) -> None:
        self.patterns = [each for each in written if each.startswith("re:")]
        plain = [each for each in written if not each.startswith("re:")]
        self.exact = {_translated(each, renamed) if "." in each else each: each for each in plain}

    def fitting(self, name: str) -> str | None:
        """The entry that fits a linear by the engine's name of it, or None."""
        found = self.exact.get(name)
        return found or next((each for each in self.patterns if _fits(each, name)), None)


def _problem(
    linear: Linear, there: str, left: str | None, chosen: str | None, ignore: _Names
) -> tuple[str, str] | None:
    """(what is wrong, what to change), None if the engine finds what is stored."""
    if linear.scheme is not None and left is not None:
        return (
            f"is quantized, but `ignore` has {left!r}, which fits it",
            f"end the pattern where the name ends, such as {left.removesuffix('$') + '$'!r}"
            if left.startswith("re:")
            else "remove that entry of `ignore`",
        )
    if linear.scheme is not None and chosen is None:
        why = (
            "the class Linear does not mean an output head"
            if HEAD.search(linear.name)
            else "no target fits it"
        )
        said = f" (there it is {there})" if there != linear.name else ""
        return f"is quantized, but {why}{said}", "name it in the `targets` of its config group"
    if linear.scheme is None and left is None and chosen is not None:
        near = next((each for each in ignore.patterns if _fits(each, linear.name)), None)
        if near is not None:
            return (
                f"is not quantized, and {near!r} of `ignore` fits its name in the file but not the engine's, {there}",
                "let the pattern begin with re:.*",
            )
        return (
            f"is not quantized, but the target {chosen!r} fits it and `ignore` does not",
            "add it to `ignore`",
        )
    return None


def _translated(name: str, renamed: Sequence[tuple[str, str]]) -> str:
    for prefix, other in renamed:
        if name.startswith(prefix):
            return other + name[len(prefix) :]
    return name


def _fits(pattern: str, name: str) -> bool:
    try:
        return matches(pattern.removeprefix("re:"), name)
    except PatternError:
        return False


def _texts(value: object) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, list | tuple) else []
