"""Rules about the shape of the code that no linter checks."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 70  # lines of a function, with its docstring
ROOTS = ("quantkit", "eval", "examples", "tests")  # kernels excepted: a kernel is one function


def too_long(source, limit=LONGEST):
    """(name, lines) of every function longer than `limit` lines, methods and inner functions too."""
    functions = (
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    sizes = ((each.name, each.end_lineno - each.lineno + 1) for each in functions)
    return [(name, lines) for name, lines in sizes if lines > limit]


def test_every_function_fits_a_screen():
    files = sorted(file for root in ROOTS for file in (ROOT / root).rglob("*.py"))
    assert len(files) > 100
    found = [
        f"{file.relative_to(ROOT)}: {name} has {lines} lines"
        for file in files
        for name, lines in too_long(file.read_text())
    ]
    assert not found, f"split these functions (at most {LONGEST} lines): {'; '.join(found)}"


def test_long_functions_are_seen_wherever_they_are_defined():
    source = "class A:\n    async def f(self):\n        def g():\n            pass\n        return g\n"
    assert too_long(source, 3) == [("f", 4)]
    assert too_long(source, 1) == [("f", 4), ("g", 2)]
    assert too_long(source, 4) == []
