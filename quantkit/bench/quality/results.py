"""Write docs/results.md from the measurements in docs/benchmarks.

python -m quantkit.bench.quality.results [--docs docs]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from quantkit.bench.quality import activations, methods, mixtures
from quantkit.files import write_atomically

# The parts of the page in order: file in docs/benchmarks -> the function that makes its text.
PARTS = {
    "methods.json": methods.markdown,
    "activations.json": activations.section,
    "mixtures.json": mixtures.markdown,
}


def page(docs: Path) -> str:
    """The text of results.md; a part that was not measured is left out."""
    parts = []
    for name, text in PARTS.items():
        file = docs / "benchmarks" / name
        if file.exists():
            measured = json.loads(file.read_text(encoding="utf-8"))
            parts.append(text(measured["rows"], measured["machine"]))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    write_atomically(arguments.docs / "results.md", iter([page(arguments.docs).encode()]))


if __name__ == "__main__":
    main()
