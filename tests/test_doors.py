"""Which room may import which: the table of docs/design.md as a dict, compared with the imports of every file."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EVERYWHERE = {"errors", "files", "paths", "scheme", "device"}
DOORS: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "files": set(),
    "paths": set(),
    "scheme": set(),
    "device": set(),
    "assets": set(),
    "numerics": {"quantkit_kernels"},  # the range search's first look at its candidates is native
    "formats": {"numerics", "quantkit_kernels"},
    "algorithms": {"numerics", "quantkit_kernels"},  # GPTQ's column loops are native
    "transforms": {"numerics"},
    "models": {"formats"},
    "structure": set(),
    "preflight": {"formats"},
    "recipe": {"algorithms", "assets", "formats", "preflight", "transforms"},
    "plan": {"algorithms", "models", "recipe"},
    "predict": {"formats", "models", "plan", "recipe"},
    "cost": {"algorithms", "models", "plan", "predict", "recipe", "transforms"},
    "allocation": {"cost", "formats", "models", "plan", "predict", "recipe"},
    "calibration": {"models", "numerics", "quantkit_eval", "structure"},
    "validation": {
        "allocation",
        "calibration",
        "formats",
        "models",
        "plan",
        "predict",
        "preflight",
        "recipe",
    },
    "layers": {"formats", "numerics", "quantkit_kernels"},
    "checkpoint": {"formats", "layers", "models", "numerics", "preflight", "quantkit_eval"},
    "runtime": {"layers", "quantkit_eval", "quantkit_kernels"},
    "report": {"checkpoint", "models", "quantkit_eval"},
}
for top in ("pipeline", "bench", "sweep", "cli"):
    DOORS[top] = {*DOORS, "quantkit_kernels", "quantkit_eval"}
ALL_ABOVE = "all rooms above"
OUTSIDE = {"quantkit_kernels": {"torch", "triton"}, "quantkit_eval": None}  # None: anything but quantkit


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def room_of(parts: tuple[str, ...]) -> str:
    """The top-level file or package that the file belongs to."""
    return {"__main__": "cli"}.get(parts[0], parts[0])


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


def used(folder: Path) -> list[tuple[str, str, str]]:
    """(file:line, room, imported room) of every import in quantkit's `folder` that leaves its room."""
    found = []
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
            if target not in {room, "__version__"} | EVERYWHERE:
                found.append((f"{inside}:{line}", room, target))
    return found


def refused(folder: Path) -> list[str]:
    """Every import in quantkit's `folder` that goes through no listed door."""
    return [
        f"{where}: {room} -> {target}"
        for where, room, target in used(folder)
        if target not in DOORS.get(room, ())
    ]


def table() -> tuple[dict[str, set[str] | None], set[str]]:
    """What docs/design.md says: (what each room may import, what every room may import)."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    doors: dict[str, set[str] | None] = {}
    rows = text.split("| room | holds | may import |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    for row in rows:
        room, _, allowed = (cell.strip() for cell in row.strip("|").split("|"))
        name = re.findall(r"`([^`]+)`", room)[0].rstrip("/").split("/")[-1].removesuffix(".py")
        if allowed == ALL_ABOVE:
            doors[name] = set(doors)
        else:
            assert re.fullmatch(r"nothing|anything but quantkit|`\w+`(, `\w+`)*", allowed), row
            doors[name] = None if allowed.startswith("anything") else set(re.findall(r"`(\w+)`", allowed))
    open_to_all = re.search(r"Every room may also import ([^.]+)\.", text)
    assert open_to_all
    return doors, set(re.findall(r"`(\w+)`", open_to_all[1]))


def test_the_design_page_says_what_is_tested_here():
    doors, everywhere = table()
    assert doors == DOORS | OUTSIDE
    assert everywhere == EVERYWHERE


def test_every_listed_door_is_used():
    taken = {(room, target) for _, room, target in used(ROOT / "quantkit")}
    listed = {(room, target) for room, allowed in DOORS.items() for target in allowed}
    tops = {"pipeline", "bench", "sweep", "cli"}
    assert {door for door in listed - taken if door[0] not in tops} == set()


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
