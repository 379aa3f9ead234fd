"""What messages quote exists: options, commands, recipe keys, Python names, pages of the docs, packages."""

import ast
import importlib
import re
import tomllib
from functools import cache
from pathlib import Path

import yaml
from quoted import commands, complaint

from quantkit.bench import roofline
from quantkit.cli.verbs import cli
from quantkit.recipe import words
from quantkit.recipe.errors import _parts
from quantkit.recipe.recipe import ALGORITHMS, TRANSFORMS, Recipe
from quantkit.sweep.grid import GridPart, SweepPart

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (ROOT / "quantkit", ROOT / "kernels", ROOT / "eval")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
KEY = re.compile(r"(?<![\w.])(?:weights|calibration|output|transforms)\.[a-z_.]*[a-z_]")
NAME = re.compile(r"(?<![\w./-])(?:quantkit(?:_eval|_kernels)?)\.[a-z_A-Z.]+")
PAGE = re.compile(r"[\w./]+\.md\b")
INSTALL = re.compile(r"pip install (?:-e )?'?([\w.-]+)(?:\[(\w+)\])?")
QUOTED = re.compile(r"`([^`]+)`|(\{match: [^}]*\})")
FILES = {"quantkit.json", "quantkit.run.json", "quantkit.html"}


def texts(file: Path) -> list[str]:
    """Every string of a file that is no docstring; the values in an f-string are left out as \\x1a."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            skipped.update(part for part in ast.walk(node) if part is not node)
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "\x1a" for p in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


@cache
def messages() -> list[tuple[str, str]]:
    """(file, text) of what the package may say, in three words or more; benchmarks parse for themselves."""
    files = [file for room in ROOMS for file in sorted(room.rglob("*.py")) if "bench" not in file.parts]
    return [
        (str(file.relative_to(ROOT)), text)
        for file in files
        for text in texts(file)
        if len(text.split()) > 2 or text.startswith("`")
    ]


def quotes(pattern: re.Pattern) -> list[tuple[str, str]]:
    """(file, what a message of it quotes)."""
    return [(file, found) for file, text in messages() for found in pattern.findall(text)]


def recipe_keys() -> set[str]:
    """Every key of a recipe with its path, list numbers left out, and every part of a recipe."""
    keys = set()
    for path, part in _parts(Recipe).items():
        here = ".".join(p for p in path if p != "*")
        keys |= {here, *(f"{here}.{name}".strip(".") for name in part.model_fields)}
    for place, union in (("weights.algorithm", ALGORITHMS), ("transforms", TRANSFORMS)):
        keys |= {f"{place}.{name}" for config in union.values() for name in config.model_fields}
    return keys


def test_options_exist():
    known = {
        opt for verb in cli.commands.values() for p in verb.params for opt in (*p.opts, *p.secondary_opts)
    }
    known |= {"--help", "--version"}
    measuring = Path(roofline.__file__).read_text(
        encoding="utf-8"
    )  # a command of its own, which messages name
    known |= set(re.findall(r'add_argument\(\s*"(--[a-z]+)"', measuring))
    found = quotes(OPTION)
    assert {option for _, option in found} >= {"--no-resume", "--output", "--no-eval", "--context"}
    assert [quote for quote in found if quote[1] not in known] == []


def test_commands_can_be_typed(monkeypatch):
    found = [(file, command) for file, text in messages() for command in commands(text)]
    assert len(found) > 2
    assert [each for each in found if complaint(*each[1], monkeypatch)] == []


def test_recipe_keys_exist():
    found, known = quotes(KEY), recipe_keys()
    assert {key for _, key in found} >= {"calibration.samples", "output.allow_split_fusion"}
    assert [quote for quote in found if quote[1] not in known] == []


def test_pieces_of_recipes_are_yaml_with_keys_that_exist():
    known = {key.rpartition(".")[2] for key in recipe_keys()} | set(words.KEYS)
    known |= set(SweepPart.model_fields) | set(GridPart.model_fields)
    seen, wrong = 0, []

    def keys(value: object) -> list[str]:
        if isinstance(value, dict):
            return [str(k) for k in value] + [k for each in value.values() for k in keys(each)]
        return [k for each in value for k in keys(each)] if isinstance(value, list) else []

    for file, pair in quotes(QUOTED):
        text = "".join(pair).replace("\x1a", "some")
        if not re.match(r"\{?[a-z_]+: ", text):
            continue
        seen += 1
        wrong += [(file, text, key) for key in keys(yaml.safe_load(text)) if key not in known]
    assert seen > 5
    assert wrong == []


def test_names_of_python_exist():
    found, wrong = 0, []
    for file, name in quotes(NAME):
        if name in FILES:
            continue
        found += 1
        module, _, attribute = name.rstrip(".").rpartition(".")
        try:
            importlib.import_module(name)
        except ImportError:
            if not hasattr(importlib.import_module(module), attribute):
                wrong.append((file, name))
    assert found
    assert wrong == []


def test_pages_of_the_docs_exist():
    found = quotes(PAGE)
    assert found
    assert [quote for quote in found if not (ROOT / quote[1]).is_file() and "/" in quote[1]] == []


def test_packages_to_install_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.match(r"[\w-]+", each)[0]
        for group in (project["dependencies"], *extras.values())
        for each in group
    }
    found = [(file, *match) for file, text in messages() for match in INSTALL.findall(text)]
    assert found
    assert [f for f in found if f[1] not in declared | {"quantkit"} or (f[2] and f[2] not in extras)] == []
