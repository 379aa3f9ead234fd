import importlib.util
import json
import subprocess
import sys

import pytest
import quantkit_kernels
import torch
from quantkit_kernels.cpu import library

from quantkit.bench.kernels import inventory
from quantkit.cli.main import run

HEAVY = ("torch", "transformers", "numpy")


@pytest.mark.parametrize("verb", ["bench", "kernels"])
def test_help_answers_without_torch(verb):
    code = (
        "import sys; from quantkit.cli.main import run; code = run(sys.argv[1:]); "
        f"sys.exit(code or any(m in sys.modules for m in {HEAVY}))"
    )
    done = subprocess.run([sys.executable, "-c", code, verb, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage")


def test_kernels_answers_every_scheme_once_per_device(tmp_path, capsys):
    assert run(["kernels", "--shape", "4096x2048", "--json", str(tmp_path / "found.json")]) == 0
    assert "native CPU library" in capsys.readouterr().out
    rows = json.loads((tmp_path / "found.json").read_text())["schemes"]
    answered = [
        (row["device"], bits, group, zero)
        for row in rows
        for bits in row["bits"]
        for group in row["groups"]
        for zero in ({"any": ("none", "stored")}.get(row["zero_point"], (row["zero_point"],)))
    ]
    assert len(answered) == len(set(answered)) == 2 * 7 * 4 * 2


def test_kernels_says_what_select_says(monkeypatch):
    monkeypatch.delenv("QUANTKIT_BACKEND", raising=False)
    for row in inventory.schemes(256, 512):
        group = 512 if row["groups"][0] == "channel" else int(row["groups"][0])
        symmetric = row["zero_point"] != "stored"
        spec = quantkit_kernels.Spec.integer(row["bits"][0], group, symmetric, 256, 512)
        chosen = quantkit_kernels.select(spec, row["device"])
        assert (row["runs"], row["why"]) == tuple(chosen)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_lists_the_number_formats_of_checkpoints(monkeypatch, capsys):
    monkeypatch.delenv("QUANTKIT_BACKEND", raising=False)
    rows = {(row["format"], row["device"]): row["runs"] for row in inventory.formats(256, 512)}
    native = "cpu" if library.available() else "reference"
    assert {runs for (_, device), runs in rows.items() if device == "cpu"} == {native}
    assert {runs for (_, device), runs in rows.items() if device == "cuda"} == {"reference"}
    assert len(rows) == 18
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    on_ampere = {row["format"]: row for row in inventory.formats(256, 512) if row["device"] == "cuda"}
    fours = {"NVFP4", "MXFP4", "NF4, groups of 64"}
    assert {name for name, row in on_ampere.items() if row["runs"] == "reference"} == fours
    assert "before its first use" in on_ampere["W8A8 int8"]["why"]
    for name, reason in (("W4A8, groups of 128", "not by int4"), ("W8A8 FP8", "this device has 8.0")):
        assert "rounded before the product" in on_ampere[name]["why"]
        assert reason in on_ampere[name]["why"]
    monkeypatch.undo()
    assert run(["kernels", "--shape", "32x48"]) == 0
    shown = capsys.readouterr().out
    assert "NVFP4" in shown
    assert "MXFP4" not in shown  # 48 columns are no groups of 32


def test_kernels_merges_what_differs_in_numbers_only(monkeypatch):
    def select(spec, device, backend):
        if spec.bits in (5, 6, 7) or (spec.bits == 2 and not spec.symmetric):
            kind = "symmetric" if spec.symmetric else "asymmetric"
            return quantkit_kernels.Choice(
                "slow", f"nothing has {kind} {spec.bits} bits in groups of {spec.group_size}"
            )
        return quantkit_kernels.Choice("fast", "built")

    monkeypatch.setattr(quantkit_kernels, "select", select)
    rows = [row for row in inventory.schemes(256, 512) if row["device"] == "cpu"]
    assert [(row["bits"], row["zero_point"], row["runs"]) for row in rows] == [
        ([2], "none", "fast"),
        ([2], "stored", "slow"),
        ([3, 4, 8], "any", "fast"),
        ([5, 6, 7], "any", "slow"),
    ]
    assert all(row["groups"] == ["32", "64", "128", "channel"] for row in rows)


def test_kernels_of_a_forced_backend_names_what_it_cannot_run():
    rows = inventory.schemes(256, 512, "torch")
    runs = {bits for row in rows if row["runs"] == "torch" for bits in row["bits"]}
    assert runs == {4, 8}
    assert all("torch" in row["why"] for row in rows if row["runs"] is None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["kernels", "--shape", "4096"],
        ["bench"],
        ["bench", "--products", "--shapes", "7b"],
        ["bench", "--products", "--m", "0"],
        ["bench", "--products", "--m", "many"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_exit_code_2(arguments, capsys):
    assert run(arguments) == 2
    assert "rror" in capsys.readouterr().err
