"""`quantkit generate`: on the native path where there is one, with an error for a path that cannot run."""

import os
import subprocess
import sys

import pytest
from quantkit_kernels.cpu import library

from quantkit import assets
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
