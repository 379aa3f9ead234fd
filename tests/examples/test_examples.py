"""The scripts in examples/ run on the embedded model, as their first lines say."""

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from quantkit import assets

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("examples")]  # one process makes the checkpoints

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = str(assets.default_model())
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}


def python(script, *arguments, stdin=""):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "own"
    return folder, python("quantize.py", "--output", folder)


def test_a_recipe_of_your_own(quantized):
    folder, said = quantized
    assert (folder / "quantkit.json").exists()
    before, after = map(float, re.search(r"size: (\S+) MB -> (\S+) MB", said).groups())
    assert after < before
    assert "KL 0." in said


def test_two_checkpoints_are_compared(quantized):
    folder, _ = quantized
    said = python("compare.py", MODEL, folder, MODEL, "--tokens", 512)
    assert f"closer to the original: {MODEL}" in said  # which is the original itself


def test_prompts_of_standard_input_are_answered_in_a_loop():
    said = python("serve.py", MODEL, "--new-tokens", 4, stdin="The king\n\nOnce upon a time\n")
    first, refused, third = said.partition("[the prompt has no tokens; give some text]")
    assert first.strip()
    assert refused
    assert third.strip()


def test_prompts_are_answered_over_http():
    command = [sys.executable, str(EXAMPLES / "serve.py"), MODEL, "--new-tokens", "4", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        try:
            address = server.stdout.readline().split()[-1]
            with urllib.request.urlopen(address, data=b"The king", timeout=120) as answer:
                assert answer.read().decode().strip()
        finally:
            server.terminate()
