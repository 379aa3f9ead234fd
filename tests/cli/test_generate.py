"""`quantkit generate`: on the native path where there is one, with an error for a path that cannot run."""

import os
import subprocess
import sys

import pytest
import tiny_models
from quantkit_kernels.cpu import library

from quantkit import assets
from quantkit.checkpoint import load as loading
from quantkit.cli.main import run

NATIVE = pytest.mark.skipif(not library.available(), reason="the native library is not built")
PROMPT = ["generate", str(assets.default_model()), "--prompt", "The king", "--max-new-tokens", "4"]


@NATIVE
def test_a_llama_runs_natively(capsys):
    assert run([*PROMPT, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "in transformers" not in captured.err
    assert "decode native: 4 tokens" in captured.err


@NATIVE
def test_int8_needs_packed_linears(capsys):
    assert run([*PROMPT, "--compute", "int8"]) == 2
    assert "no packed linears" in capsys.readouterr().err


@NATIVE
def test_an_instruction_set_that_is_missing_is_an_error():
    missing = next(
        (name for i, name in enumerate(library.ISAS) if not library.load().qk_isa_available(i)), None
    )
    if missing is None:
        pytest.skip("this machine has them all")
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", *PROMPT],
        env=os.environ | {"QUANTKIT_ISA": missing, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"QUANTKIT_ISA='{missing}' cannot run on this CPU" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("default:the native CPU kernels are not built")
def test_missing_native_kernels_are_one_line_of_messages(monkeypatch, capsys, tmp_path):
    model = tiny_models.save(tiny_models.FAMILIES["llama"](), tmp_path / "m")
    recipe = ["w4a16-rtn", "--set", "weights.group_size=32", "--no-eval", "--device", "cpu"]
    assert run(["quantize", *recipe, "--model", str(model), "--output", str(tmp_path / "q")]) == 0
    capsys.readouterr()
    monkeypatch.delenv("QUANTKIT_BACKEND")
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(loading, "_hinted", False)
    for _ in range(2):
        assert (
            run(
                ["generate", str(tmp_path / "q"), "--device", "cpu", "--prompt", "a", "--max-new-tokens", "2"]
            )
            == 0
        )
    said = capsys.readouterr().err
    assert (
        said.count("warning: the native CPU kernels are not built, so decode on the CPU is about 15 times")
        == 1
    )
    assert "UserWarning" not in said
