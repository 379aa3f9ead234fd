"""What is compared with vLLM, and how; with vLLM itself behind the marker `peers`."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from quantkit.bench.quality import engines
from quantkit.scheme import KV_PRESETS, PRESETS


def test_every_stored_preset_and_every_cache_of_the_engine_is_a_case():
    cases = engines.cases()
    assert set(PRESETS) - set(cases) == {"NF4"}
    assert {f"KV {name}" for name in KV_PRESETS} - set(cases) == {"KV KIVI4", "KV KIVI2"}
    assert cases["KV INT8"].options == {"kv_cache_dtype": "int8_per_token_head"}
    assert cases["KV FP8"].options == {}  # the checkpoint says it
    assert cases["W4A16, KV FP8"].recipe["weights"]["preset"] == "W4A16"


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        (
            "[rank0]: Traceback\n[rank0]:   File\n[rank0]: NotImplementedError: FP8 needs AVX-512.\n",
            "NotImplementedError: FP8 needs AVX-512.",
        ),
        (
            "INFO: x\nValueError: one\n\nThe above exception\nRuntimeError: Engine failed\n",
            "RuntimeError: Engine failed",
        ),
        ("Killed\n", "Killed"),
    ],
    ids=["of a rank", "the last", "no exception"],
)
def test_the_reason_is_the_last_exception(stderr, said):
    assert engines.reason(stderr) == said


def test_agreement_is_counted_up_to_the_first_other_token():
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    mine = {"tokens": [*range(engines.NEW)], "first": scores}
    tokens = [0, 1, 2, 9, *range(4, engines.NEW)]
    theirs = {"tokens": tokens, "first": {"3": float(scores[3]) + 0.25, "0": float(scores[0])}, "text": "abc"}
    found = engines.compared(mine, theirs)
    assert found["same_tokens"] == 3
    assert found["first_logprobs_differ_by"] == pytest.approx(0.25)
    same = engines.compared(mine, theirs | {"tokens": mine["tokens"]})
    assert same["same_tokens"] == same["of"] == engines.NEW


def test_an_engine_that_ends_is_an_outcome_of_the_jobs_it_left(monkeypatch, tmp_path):
    def ended(command, **_):
        first = 'INFO: x\nRESULT {"error": "ValueError: no\\n kernel"}\n'
        return subprocess.CompletedProcess(command, 1, first, "MemoryError: none left\n")

    monkeypatch.setattr(engines.subprocess, "run", ended)
    found = engines.engine(Path("python"), tmp_path, [{}, {}])
    assert found == [{"error": "ValueError: no kernel"}, {"error": "MemoryError: none left"}]
    row = {"scheme": "W8A8", "loads": False} | found[0]
    assert engines.line(row) == "W8A8: ValueError: no kernel"


def test_the_matrix_has_every_integer_scheme_that_engines_differ_about():
    matrix = engines.matrix()
    for name in ("W4A16 g96 sym", "W8A16 channel asym", "W3A16 g256 sym", "W2A16 g32 asym"):
        assert matrix[name].wide
    assert sum("," not in name for name in matrix) == 48
    assert "W4A16, down_proj with 8 bits" in matrix


def test_an_unknown_scheme_is_named(tmp_path):
    with pytest.raises(SystemExit, match="unknown scheme 'W9A9'; known: W8A16, "):
        engines.run(tmp_path, Path("python"), ["W9A9"])


@pytest.mark.peers
@pytest.mark.timeout(7200)
def test_vllm_writes_what_we_write_or_refuses_what_the_preflight_refused(tmp_path):
    """QUANTKIT_PEERS: a folder that keeps the environment between runs; QUANTKIT_VLLM: an interpreter with vLLM."""
    work = Path(os.environ.get("QUANTKIT_PEERS", tmp_path))
    python = os.environ.get("QUANTKIT_VLLM")
    names = [
        "W8A8",
        "W4A16",
        "KV FP8_TENSOR",
        "W8A16 g96 asym",
        "W4A16, v_proj skipped",
        "W8A8, down_proj skipped",
    ]
    rows = engines.run(work, Path(python) if python else None, names)["rows"]
    assert [each["scheme"] for each in rows if not each["agrees"]] == []
    for prompt in (
        one
        for each in rows
        if each["loads"] and not engines.cases()[each["scheme"]].wide
        for one in each["prompts"]
    ):
        assert prompt["first_logprobs_differ_by"] < 0.2
        assert prompt["same_tokens"] >= 1
