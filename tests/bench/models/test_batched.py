"""`quantkit.bench.models.batched` with a stand-in for llama-batched-bench."""

import argparse
import json
import stat
import sys
from pathlib import Path

import pytest

from quantkit.bench import rounds, synthetic
from quantkit.bench.machine import native_available
from quantkit.bench.models import batched, decode, llamacpp

LINE = (
    '{"n_kv_max": 512, "is_pp_shared": 0, "pp": 6, "tg": 3, "pl": %d, "n_kv": 36, "t_pp": 2.0, "speed_pp": %f, '
    '"t_tg": 4.0, "speed_tg": %f, "t": 6.0, "speed": 8.0}'
)


def test_the_line_of_the_batch_is_read():
    text = "main: n_kv_max = 512\n\n" + "\n".join(LINE % (b, 10.0 * b, 3.0 * b) for b in (1, 4)) + "\n\n"
    assert batched.read_batched(text, 4) == {"decode": 12.0, "prefill": 40.0}
    with pytest.raises(ValueError, match="nothing of 16 sequences"):
        batched.read_batched(text, 16)


@pytest.fixture
def program(tmp_path):
    """Says what llama-batched-bench would, and keeps how it was called."""
    path = tmp_path / "llama-batched-bench"
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"print('noise'); open({str(tmp_path / 'called')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        f"b = int(sys.argv[sys.argv.index('-npl') + 1])\nprint({LINE!r} % (b, 10.0 * b, 2.0))\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.skipif(not native_available(), reason="the native library is not built")
def test_both_engines_run_every_batch_interleaved(program, tmp_path, monkeypatch):
    monkeypatch.delenv("QUANTKIT_BACKEND", raising=False)
    monkeypatch.setattr(rounds, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr(batched, "interleave", lambda engines, n: rounds.interleave(engines, n, lambda: 1e9))
    monkeypatch.setattr(llamacpp, "files", lambda built, dense, kinds: dict.fromkeys(kinds, program))
    tiny = synthetic.Shape(hidden=128, intermediate=256, heads=4, kv_heads=2, vocabulary=160)
    monkeypatch.setitem(decode.ALL, "1.1b", tiny)
    arguments = argparse.Namespace(
        work=tmp_path, layers=2, shape="1.1b", formats=["Q4_0"], ways=["native W4A8", "native W4A16"]
    )
    vars(arguments).update(batch=[1, 3], rounds=2, prompt=6, new=3, threads=2)
    built = llamacpp.Built(*[program] * 4, Path(sys.executable), "stand-in 1", False)
    report = batched.run(arguments, built)
    assert list(report["engines"]) == [
        f"{engine}, batch {batch}"
        for batch in (1, 3)
        for engine in ("native W4A8", "native W4A16", "llama.cpp Q4_0")
    ]
    calls = (tmp_path / "called").read_text().splitlines()
    assert len(calls) == 2 * (2 + 1)  # rounds and a warm-up
    assert "-npp 6 -ntg 3 -npl 3 -t 2 -tb 2 --output-format jsonl" in calls[0]  # the warm-up goes backwards
    assert "-c 27 " in calls[0]
    row = report["times_faster"][0]
    assert (row["batch"], row["engine"], row["than"]) == (1, "native W4A8", "llama.cpp Q4_0")
    speeds = report["engines"]["native W4A8, batch 1"]["decode"]["rounds"]
    assert row["decode"] == pytest.approx(sum(speeds) / 2 / 2.0)  # the median of two
    assert len(report["times_faster"]) == 4
    json.dumps(report)
    assert "native W4A16, batch 3" in decode.table(report)
