"""YAML text to plain data, remembering where each value was written; nothing in the text can hurt.

Only plain YAML is understood (no tags that build objects); size, depth, aliases and number of values are
bounded, and a key written twice is an error. `--set key=value` changes the same data and is remembered as its
origin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 20_000
MAX_ALIASES = 100
_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, plus floats without a dot (1e-2), which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class Located:
    """Plain data and where it came from.

    data: dicts, lists and scalars. origins: path -> "file:line" or "--set key=value".
    problems: "origin: path: message".
    """

    data: Any
    name: str
    origins: dict[Path, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def origin(self, path: Path) -> str:
        """Where the value at `path`, or its nearest enclosing value, was written."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return self.name

    def problem(self, path: Path, message: str) -> None:
        self.problems.append(f"{self.origin(path)}: {dotted(path)}: {message}")


def dotted(path: Path) -> str:
    """("rules", 0, "bits") -> "rules.0.bits"."""
    return ".".join(map(str, path)) or "recipe"


def read(text: str, name: str) -> Located:
    """Parse one YAML document; syntax errors and broken bounds land in `.problems`."""
    found = Located(None, name, {(): f"{name}:1"})
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        found.problem((), f"larger than {MAX_BYTES:,} bytes; a recipe is a page of text")
        return found
    try:
        _check_bounds(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                found.data = _build(loader, node, (), found, [0])
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark.line if error.problem_mark else 0) + 1
        found.problems.append(f"{name}:{line}: not valid YAML: {error.problem or error.context}")
    except (yaml.YAMLError, ValueError) as error:
        found.problems.append(f"{name}: not valid YAML: {str(error).splitlines()[0]}")
    return found


def _check_bounds(text: str) -> None:
    """Stop at the first event beyond a bound: the event parser does not recurse, the tree builder does."""
    depth = values = aliases = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        values += isinstance(event, yaml.NodeEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"line {event.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels")
        if aliases > MAX_ALIASES or values > MAX_VALUES:
            raise ValueError(
                f"line {event.start_mark.line + 1}: more than {MAX_ALIASES} aliases or {MAX_VALUES} values"
            )


def _build(loader: _Loader, node: yaml.Node, path: Path, found: Located, count: list[int]) -> Any:
    count[0] += 1
    if count[0] > MAX_VALUES or len(path) > MAX_DEPTH:
        raise ValueError(f"line {node.start_mark.line + 1}: aliases expand to more than {MAX_VALUES} values")
    found.origins[path] = f"{found.name}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTIONS:
        raise yaml.constructor.ConstructorError(
            problem=f"tag {node.tag!r} is refused", problem_mark=node.start_mark
        )
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, i), found, count) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        here = (*path, key)
        line = f"{found.name}:{key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            found.problems.append(f"{line}: {dotted(path)}: a key must be plain text, got {key!r}")
        elif key in result:
            first = found.origin(here).rsplit(":", 1)[-1]
            found.problems.append(f"{line}: {dotted(here)}: written twice, first in line {first}; keep one")
        else:
            result[key] = _build(loader, value_node, here, found, count)
            found.origins[here] = line
    return result


def apply_override(found: Located, override: str) -> None:
    """Apply one "dotted.path=YAML value" to `found` in place; list items by index, index = length appends."""
    origin = f"--set {override}"
    dotted_path, equals, text = override.partition("=")
    path: Path = tuple(int(p) if p.isdecimal() and len(p) < 6 else p for p in dotted_path.strip().split("."))
    if not equals or "" in path:
        found.problems.append(f"{origin}: expected key=value, for instance weights.bits=3")
        return
    value = read(text, origin)
    if value.problems:
        found.problems += value.problems
        return
    here = found.data = found.data if isinstance(found.data, dict) else {}
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if not _fits(here, key):
            place = dotted(path[:depth])
            kind = f"a list of {len(here)}" if isinstance(here, list) else "a mapping"
            found.problems.append(f"{origin}: {place} is {kind}, so {key!r} names nothing in it")
            return
        if isinstance(here, list) and key == len(here):
            here.append(None)
        if last:
            here[key] = value.data
            break
        below = here[key] if isinstance(here, list) else here.get(key)
        if below is None:
            below = [] if isinstance(path[depth + 1], int) else {}
        elif not isinstance(below, dict | list):
            name = short_key(path[: depth + 1])
            if name is None:
                found.problems.append(
                    f"{origin}: {dotted(path[: depth + 1])} is a single value, not a mapping"
                )
                return
            below = {name: below}
        here[key] = below
        here = below
    for old in [p for p in found.origins if p[: len(path)] == path]:
        del found.origins[old]
    found.origins[path] = origin


def _fits(container: dict | list, key: str | int) -> bool:
    if isinstance(container, list):
        return isinstance(key, int) and key <= len(container)
    return isinstance(key, str)


def short_key(path: Path) -> str | None:
    """The key a bare value at `path` stands for: `algorithm: gptq` is `algorithm: {name: gptq}`."""
    if path[:2] == ("calibration", "data"):
        return "source"
    return "name" if path[-1] == "algorithm" or path[0] == "transforms" else None
