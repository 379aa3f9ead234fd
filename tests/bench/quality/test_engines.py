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


def test_an_engine_that_ends_is_an_outcome(monkeypatch):
    def ended(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "ValueError: no kernel\n")

    monkeypatch.setattr(engines.subprocess, "run", ended)
    found = engines.engine(Path("python"), Path("model"), [[1]], {})
    assert found == {"error": "ValueError: no kernel"}
    row = {"scheme": "W8A8", "loads": False} | found
    assert engines.line(row) == "W8A8: ValueError: no kernel"


def test_an_unknown_scheme_is_named(tmp_path):
    with pytest.raises(SystemExit, match="unknown scheme 'W9A9'; known: W8A16, "):
        engines.run(tmp_path, Path("python"), ["W9A9"])


@pytest.mark.peers
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "KV FP8_TENSOR"])
def test_vllm_writes_what_we_write_or_says_why_not(scheme, tmp_path):
    """QUANTKIT_PEERS: a folder that keeps the environment between runs."""
    work = Path(os.environ.get("QUANTKIT_PEERS", tmp_path))
    (found,) = engines.run(work, None, [scheme])["rows"]
    if not found["loads"]:  # a processor without the kernels, in vLLM's own words
        assert "AVX-512" in found["error"]
        return
    for prompt in found["prompts"]:
        assert prompt["first_logprobs_differ_by"] < 0.1
        assert prompt["same_tokens"] >= 1
