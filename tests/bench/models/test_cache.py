"""The measurement of decoding behind a long context, on a tiny model: it runs, and leaves the caches as they were."""

import pytest
from quantkit_kernels.cpu import kv_pages, library

from quantkit.bench import synthetic
from quantkit.bench.models import cache, decode
from quantkit.bench.rounds import interleave

TINY = synthetic.Shape(hidden=128, intermediate=256, heads=4, kv_heads=2, vocabulary=160)


@pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")
def test_every_cache_inside_transformers_is_measured(tmp_path, monkeypatch):
    monkeypatch.delenv("QUANTKIT_BACKEND", raising=False)
    made = decode.models(tmp_path, 2, TINY)
    monkeypatch.setattr(decode, "models", lambda work: made)
    native = kv_pages.native
    calls = []
    monkeypatch.setattr(kv_pages, "native", lambda *given: (calls.append(1), native(*given)))
    ready, sizes = cache.within_transformers(
        tmp_path, list(cache.INSIDE), depth=300, prompt=5, chunk=9, new=3
    )
    assert list(ready) == [f"transformers {kind}" for kind in cache.INSIDE]
    for name, run in ready.items():
        before, length = len(calls), run.args[2].get_seq_length()
        found = run()
        assert found["decode"] > 0
        assert found["prefill"] > 0
        assert found["chunk"] > 0
        assert run.args[2].get_seq_length() == length == 300
        assert len(calls) - before == (0 if name == "transformers exact" else 2 * 6)  # layers x forwards
    assert sizes["transformers int4"] < sizes["transformers int8"] < sizes["transformers exact"]


def test_every_round_is_kept():
    speeds, kept = iter(range(1, 9)), []
    whole = interleave(
        {"a": lambda: {"decode": float(next(speeds))}}, 3, lambda: 1.0, lambda _: None, keep=kept.append
    )
    assert [one["engines"]["a"]["decode"]["rounds"] for one in kept] == [[2.0], [2.0, 3.0], [2.0, 3.0, 4.0]]
    assert kept[-1] == whole
