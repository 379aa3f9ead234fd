"""Which room may import which: the design's table as a dict, read against the syntax tree of every file."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EVERYWHERE = {"errors", "paths", "scheme", "device"}
ANY = None
DOORS: dict[str, set[str] | None] = {
    "__init__": set(),
    "errors": set(),
    "paths": set(),
    "scheme": set(),
    "device": set(),
    "assets": set(),
    "numerics": set(),
    "formats": {"numerics", "quantkit_kernels"},  # the bit packing is defined once, beside the ops
    "algorithms": {"numerics"},
    "transforms": {"numerics"},
    "models": {"layers", "formats"},  # formats: how quantized tensors are named
    "structure": {"models"},
    "recipe": {
        "algorithms",
        "transforms",
        "assets",
        "formats",
    },  # assets: a shipped recipe; formats: their names
    "plan": {"recipe", "models", "algorithms"},  # algorithms: their config types
    "predict": {"plan", "recipe", "models"},
    "validation": {"plan", "predict", "recipe", "models", "calibration"},
    "calibration": {"models", "structure", "numerics", "quantkit_eval"},  # quantkit_eval: opening datasets
    "layers": {"formats", "numerics", "quantkit_kernels"},  # numerics: QuantizedWeight
    "checkpoint": {"layers", "models", "formats", "numerics"},
    "runtime": {
        "layers",
        "models",
        "quantkit_kernels",
        "quantkit_eval",
    },  # quantkit_eval: its sampler and checks
    "pipeline": ANY,
    "bench": ANY,
    "cli": ANY,
}
NOBODY_IMPORTS = {"pipeline", "bench", "cli"}
OUTSIDE = {"quantkit_kernels": {"torch", "triton"}, "quantkit_eval": None}


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def room_of(parts: tuple[str, ...]) -> str:
    """A package's files belong to the package; those of the recipe stand beside each other."""
    return "recipe" if parts[0].startswith("recipe_") else {"__main__": "cli"}.get(parts[0], parts[0])


def imports(file: Path, package: str) -> list[tuple[int, tuple[str, ...]]]:
    """(line, dotted parts) of every import in the file, at any depth; type-only blocks excepted."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typed:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, tuple(alias.name.split("."))) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            found += [(node.lineno, (*base, alias.name)) for alias in node.names]
    return found


def refused(folder: Path) -> list[str]:
    """Every import in quantkit's `folder` that goes through no listed door."""
    problems = []
    for file in python_files(folder):
        inside = file.relative_to(folder)
        room = room_of(inside.with_suffix("").parts)
        package = ".".join(("quantkit", *inside.parent.parts))
        for line, parts in imports(file, package):
            if parts[0] == "quantkit":
                target = room_of(parts[1:]) if len(parts) > 1 else "__init__"
            elif parts[0] in OUTSIDE:
                target = parts[0]
            else:
                continue
            if target in {room, "__version__"} | EVERYWHERE:
                continue
            allowed = DOORS.get(room, set())
            if (allowed is not ANY and target not in allowed) or (
                target in NOBODY_IMPORTS and room not in NOBODY_IMPORTS
            ):
                problems.append(f"{inside}:{line}: {room} -> {target}")
    return problems


def test_quantkit_uses_only_listed_doors():
    assert refused(ROOT / "quantkit") == []


def test_an_unlisted_door_is_found(tmp_path):
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "x.py").write_text("def f():\n    from quantkit.algorithms import gptq\n")
    (tmp_path / "plan.py").write_text("from .cli import main\nfrom quantkit.scheme import Scheme\n")
    assert refused(tmp_path) == ["formats/x.py:2: formats -> algorithms", "plan.py:1: plan -> cli"]


def test_every_room_is_listed():
    rooms = {
        room_of(file.relative_to(ROOT / "quantkit").with_suffix("").parts)
        for file in python_files(ROOT / "quantkit")
    }
    assert rooms <= set(DOORS)


@pytest.mark.parametrize(("folder", "name"), [("kernels", "quantkit_kernels"), ("eval", "quantkit_eval")])
def test_outer_packages_know_nothing_of_quantkit(folder, name):
    problems = []
    for file in python_files(ROOT / folder / name):
        inside = file.relative_to(ROOT / folder)
        for line, parts in imports(file, ".".join(inside.parent.parts)):
            allowed = OUTSIDE[name]
            foreign = allowed is not None and parts[0] not in allowed | set(sys.stdlib_module_names) | {name}
            if parts[0] != name and (parts[0].startswith("quantkit") or foreign):
                problems.append(f"{inside}:{line}: {'.'.join(parts)}")
    assert problems == []


@pytest.mark.parametrize("folder", ["kernels", "eval"])
def test_source_roots_are_not_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()
