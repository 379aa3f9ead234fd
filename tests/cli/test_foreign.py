"""`quantkit eval` and `generate` on a small checkpoint of every other tool, inputs and caches rounded as it says."""

import shutil
from pathlib import Path

import pytest
import tiny_models

from quantkit.cli.main import run

FIXTURES = Path(__file__).parents[1] / "fixtures"
# fixture -> its tool
CHECKPOINTS = {
    "gptq4-desc-act": "GPTQModel or AutoGPTQ",
    "awq4-gemm": "AutoAWQ",
    "autoround-int4": "AutoRound",
    "bnb-nf4": "bitsandbytes",
    "modelopt-fp8-kv-fp8": "NVIDIA ModelOpt",
    "nvfp4": "compressed-tensors",
    "mxfp8": "compressed-tensors",
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_it_is_measured_and_writes(name, tmp_path, capsys):
    folder = shutil.copytree(
        FIXTURES / name, tmp_path / "model", ignore=shutil.ignore_patterns("logits.safetensors")
    )
    tiny_models.tokenizer().save_pretrained(folder)
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 20)
    text = ["--text", str(tmp_path / "text"), "--context", "32", "--max-tokens", "64"]
    assert run(["eval", str(folder), *text, "--device", "cpu"]) == 0
    measured = capsys.readouterr().out
    assert "perplexity" in measured
    assert "nan" not in measured
    prompt = ["--prompt", "the quick", "--max-new-tokens", "3", "--temperature", "0"]
    assert run(["generate", str(folder), *prompt, "--device", "cpu"]) == 0
    assert "3 tokens" in capsys.readouterr().err
    assert run(["inspect", str(folder)]) == 0
    assert CHECKPOINTS[name] in capsys.readouterr().out
