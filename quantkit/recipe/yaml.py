"""Reads YAML into plain data, remembers the line of each value, and reports every mistake instead of the first.

Only mappings, lists, text, numbers, true/false and null are read; a tag that stands for anything else is refused. Size,
depth, aliases and number of values are bounded, and a key written twice is an error. `--set key=value` changes the
same data; errors about such a value name the option instead of a line.
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
_TAG = "tag:yaml.org,2002:"
_COLLECTIONS = {f"{_TAG}{kind}" for kind in ("map", "seq")}
_SCALARS = {f"{_TAG}{kind}" for kind in ("str", "int", "float", "bool", "null")}
_SHOWN = 60  # characters of a value in a message

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with two differences.

    Floats without a dot (1e-2), which YAML 1.1 takes for text, are floats; dates (2026-11-28) and `=` are text.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _SCALARS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class Located:
    """Data read from YAML and the place where each value was written.

    data: dicts, lists and scalars. origins: path -> "file:line" or "--set key=value". problems: one line per mistake,
    "origin: path: message".
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
    """("rules", 0, "bits") -> "rules.0.bits"; a key is cut and escaped, so that a message stays one line."""
    parts = [text if text.isprintable() else ascii(text)[1:-1] for text in map(str, path)]
    return ".".join(part[:_SHOWN] for part in parts) or "recipe"


def read(text: str, name: str) -> Located:
    """Parse one YAML document; syntax errors and exceeded bounds are listed in `.problems`."""
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
        found.problems.append(
            f"{name}: not valid YAML: {(str(error) or type(error).__name__).splitlines()[0]}"
        )
    return found


def _line(at: yaml.Node | yaml.Event) -> int:
    """The line, from 1, where a part of the text begins."""
    return (at.start_mark.line if at.start_mark else 0) + 1


def _check_bounds(text: str) -> None:
    """ValueError at the first event beyond a bound.

    PyYAML's event parser does not recurse, its tree builder does, so this pass must come first.
    """
    depth = values = aliases = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        values += isinstance(event, yaml.NodeEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"line {_line(event)}: nested deeper than {MAX_DEPTH} levels")
        if aliases > MAX_ALIASES or values > MAX_VALUES:
            raise ValueError(f"line {_line(event)}: more than {MAX_ALIASES} aliases or {MAX_VALUES} values")


def _build(loader: _Loader, node: yaml.Node, path: Path, found: Located, count: list[int]) -> Any:
    """The data of a node and of all below it. count: a counter of the values built so far, aliases included."""
    count[0] += 1
    if count[0] > MAX_VALUES or len(path) > MAX_DEPTH:
        raise ValueError(f"line {_line(node)}: aliases expand to more than {MAX_VALUES} values")
    found.origins[path] = f"{found.name}:{_line(node)}"
    if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTIONS:
        raise yaml.constructor.ConstructorError(
            problem=f"tag {node.tag!r} is refused", problem_mark=node.start_mark
        )
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, i), found, count) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(loader, node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = _scalar(loader, key_node) if isinstance(key_node, yaml.ScalarNode) else None
        line = f"{found.name}:{_line(key_node)}"
        if not isinstance(key, str):
            found.problems.append(f"{line}: {dotted(path)}: a key must be plain text, got {key!r}")
            continue
        here = (*path, key)
        if key in result:
            first = found.origin(here).rsplit(":", 1)[-1]
            found.problems.append(f"{line}: {dotted(here)}: written twice, first in line {first}; keep one")
        else:
            result[key] = _build(loader, value_node, here, found, count)
            found.origins[here] = line
    return result


def _scalar(loader: _Loader, node: yaml.Node) -> Any:
    """The value of a scalar node; ConstructorError whatever PyYAML raises about it."""
    problem = None
    value = None
    if node.tag not in _SCALARS:
        problem = f"tag {node.tag!r} is refused; write plain text, numbers, true or false"
    else:
        try:
            value = loader.construct_object(node)
        except Exception as error:  # an IndexError for `!!int ''`, a KeyError for `!!bool x`, and others
            kind = node.tag.removeprefix(_TAG)
            problem = f"{node.value[:_SHOWN]!r} cannot be read as {kind}"
            if isinstance(error, ValueError) and "digits" in str(error):
                problem += f": it has {len(node.value)} digits"
        if isinstance(value, str) and not is_clean(value):
            value = _pairs_joined(value)
        if isinstance(value, str) and not is_clean(value):
            problem = f"{value[:_SHOWN]!r} holds a NUL character or half of a surrogate pair; remove it"
    if problem:
        raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
    return value


def _pairs_joined(text: str) -> str:
    r"""The text with "\ud83d\ude00", as JSON writes an emoji, made one character; YAML itself knows no pairs."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def is_clean(text: str) -> bool:
    """Whether the text can be a path and be written as UTF-8: no NUL character, no lone surrogate."""
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)


def apply_override(found: Located, override: str) -> None:
    """Apply one "dotted.path=YAML value" to `found` in place; list items by index, index = length appends."""
    origin = f"--set {override}"
    dotted_path, equals, text = override.partition("=")
    path: Path = tuple(int(p) if p.isdecimal() and len(p) < 6 else p for p in dotted_path.strip().split("."))
    if not equals or "" in path:
        found.problems.append(f"{origin}: expected key=value, for instance weights.bits=3")
        return
    if len(path) > MAX_DEPTH:
        found.problems.append(f"{origin[:_SHOWN]}...: the path has more than {MAX_DEPTH} parts")
        return
    value = read(text, origin)
    if value.problems:
        found.problems += value.problems
        return
    if found.data is None:
        found.data = {}
    if not isinstance(found.data, dict):
        return  # reported once, by whoever reads the data: there is nothing in it to change
    here: Any = found.data
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
        below = here.get(key) if isinstance(here, dict) else here[key]
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


def _fits(container: dict[str, Any] | list[Any], key: str | int) -> bool:
    if isinstance(container, list):
        return isinstance(key, int) and key <= len(container)
    return isinstance(key, str)


def short_key(path: Path) -> str | None:
    """The key a bare value at `path` stands for: `algorithm: gptq` is `algorithm: {name: gptq}`."""
    if path[:2] == ("calibration", "data"):
        return "source"
    return "name" if path[-1] == "algorithm" or path[0] == "transforms" else None
