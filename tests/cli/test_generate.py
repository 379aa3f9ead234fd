"""`quantkit generate`: on the native path where there is one, with an error for a path that cannot run."""

import os
import subprocess
import sys

import pytest
import torch
from quantkit_kernels.cpu import library

from quantkit import assets
from quantkit.cli import opening
from quantkit.cli.main import run
from quantkit.layers.quant_linear import QuantLinear

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


def test_missing_native_kernels_are_hinted_at_for_packed_models_only(monkeypatch, capsys):
    monkeypatch.setattr(library, "available", lambda: False)
    packed = torch.nn.Module()
    packed.linear = QuantLinear.__new__(QuantLinear)
    torch.nn.Module.__init__(packed.linear)
    for model, hinted in ((packed, True), (torch.nn.Linear(2, 2), False)):
        model.device = torch.device("cpu")
        opening._hint_at_missing_kernels(model)
        assert ("15 times slower" in capsys.readouterr().err) is hinted
    packed.device = torch.device("meta")
    opening._hint_at_missing_kernels(packed)
    assert capsys.readouterr().err == ""
