"""Write the configs and headers of a 70B Llama and of a mixture of 128 experts and 235B, without their weights.

    python tests/bench/headers.py DIR && python -m quantkit.bench.plan --work DIR --published

Files are as long as they would be, and sparse, so they take no room.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import published


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in (("llama-3-70b", published.LLAMA_3_70B), ("qwen3-235b", published.QWEN3_235B)):
        print(f"{folder / name}: {published.write(folder / name, config) / 1e9:.1f}B weights")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
