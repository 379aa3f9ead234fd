"""Random command lines: an exit code that is documented, never a traceback."""

import os
import random

import pytest
import torch

from quantkit import assets
from quantkit.cli.main import run
from quantkit.cli.verbs import cli

VALUES = (
    "", "-", "--", "0", "-1", "1", "nan", "inf", "1e999", "9" * 40, "x" * 5000, "a\0b", "\x1b[31m", "[/i]", "{",
    "~nobody", "../..", "/dev/null", "/proc/self/mem", "ü/\udce9", "w4a16-gptq", "weights.bits=9", "weights=",
    "=", "a.b.c=[1", "cuda:99", "cpu", "auto", "native", "NxK", "0x0", "1x1", "²x²",
    "٣", str(assets.recipe_path("w4a16-rtn")),
)  # fmt: skip
# Valid on purpose these verbs would start to work; a nonsense argument comes first.
FIRST = {"quantize": "no-such-recipe", "eval": "/no/such", "generate": "/no/such", "bench": "--no-such"}


def command_line(choose):
    verb = choose.choice(sorted(cli.commands))
    options = [name for p in cli.commands[verb].params for name in (*p.opts, *p.secondary_opts)]
    line = [verb, *([FIRST[verb]] if verb in FIRST else [])]
    for _ in range(choose.randrange(5)):
        line.append(choose.choice([*VALUES, *(name for name in options if name.startswith("-"))]))
    return line if choose.random() < 0.95 else [choose.choice(VALUES), *line]


@pytest.fixture(autouse=True)
def _threads_come_back(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(8))
def test_any_command_line_ends_with_a_documented_code(seed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    choose = random.Random(seed)
    for _ in range(40):
        line = command_line(choose)
        if "--check" in line:
            continue
        code = run(line)
        captured = capsys.readouterr()
        assert code in (0, 1, 2), line
        assert "Traceback" not in captured.err, line
        assert "This is a bug" not in captured.err, (line, captured.err)
        assert code == 0 or captured.err.strip(), line
        assert "\x1b" not in captured.out + captured.err, line
