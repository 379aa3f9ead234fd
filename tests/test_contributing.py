"""CONTRIBUTING.md's examples work: applied to a copy of the package, they quantize a model and run it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BLOCK = re.compile(r"```(python|diff)\n(.*?)```", re.DOTALL)

RUN = """
import json, sys
import torch
import quantkit
from quantkit.algorithms.rtn import rtn
from quantkit.scheme import NUMBERS, Grid

root, model, output = sys.argv[1:]
assert quantkit.__file__.startswith(root), quantkit.__file__
recipe = {
    "weights": {"bits": 4, "group_size": 32, "symmetric": False, "algorithm": {"name": "cropped", "share": 0.8}},
    "transforms": ["balance"],
    "output": {"format": "plain"},
    "calibration": {"samples": 4, "sequence_length": 32},
}
result = quantkit.quantize(recipe, model, output, evaluate=False, device="cpu")
assert {layer.algorithm for layer in result.manifest.layers} == {"cropped"}
assert result.manifest.scaling and all(s["output_change"] < 1e-3 for s in result.manifest.scaling)
ids = torch.arange(8)[None]
with torch.no_grad():
    one, other = (quantkit.load(output, device="cpu", backend=b)(ids).logits for b in ("reference", "auto"))
assert torch.allclose(one, other, atol=1e-4)

weight = torch.randn(4, 64)
quantized = rtn(weight, Grid(NUMBERS["powers3"], "group", 32), torch.float32)
levels = quantized.dequantize().view(4, 2, 32) / quantized.scale[:, :, None]
assert {round(v, 4) for v in levels.flatten().tolist()} <= {-1, -0.5, -0.25, 0, 0.125, 0.25, 0.5, 1}
"""


def applied(root: Path) -> list[str]:
    """Apply every block of the page to the sources under `root`; the files it touched."""
    touched = []
    for kind, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        head, _, body = text.partition("\n")
        if kind == "python":
            file = root / head.removeprefix("# ")
            assert not file.exists(), file
            file.write_text(body, encoding="utf-8")
        else:
            file = root / head.removeprefix("--- ")
            old, new = ("".join(f"{x[1:]}\n" for x in body.splitlines() if x[0] == sign) for sign in "-+")
            source = file.read_text(encoding="utf-8")
            assert source.count(old) == 1, f"{file} has {source.count(old)} times: {old}"
            file.write_text(source.replace(old, new), encoding="utf-8")
        touched.append(str(file.relative_to(root)))
    return touched


@pytest.fixture
def package(tmp_path):
    shutil.copytree(ROOT / "quantkit", tmp_path / "copy" / "quantkit")
    shutil.copytree(ROOT / "recipes", tmp_path / "copy" / "recipes")
    return tmp_path / "copy"


def test_what_a_stranger_adds_is_one_file_its_options_and_one_import(package, tmp_path):
    touched = applied(package)
    assert touched.count("quantkit/algorithms/catalog.py") == 1
    assert len(touched) == 9
    model = tiny_models.save(tiny_models.build("llama-gqa"), tmp_path / "model", torch.bfloat16)
    roots = [str(package), str(ROOT / "kernels"), str(ROOT / "eval")]
    script = f"import sys; sys.path[:0] = {roots!r}\n{RUN}"
    command = [sys.executable, "-c", script, str(package), str(model), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
