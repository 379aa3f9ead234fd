"""The native decoder with a quantized cache against transformers with the same one, on tiny random models.

Both round entries that they compute in another order of sums, so now and then a code differs by one: errors are
compared with what the rounding itself changes.
"""

from dataclasses import replace

import pytest
import tiny_models
import torch
from quantkit_kernels.cpu import library
from quantkit_kernels.cpu.decoder import Cache, Decoder

from quantkit.layers.kv_cache import attach, cache_of
from quantkit.layers.kv_entries import Entries
from quantkit.numerics.kv import KVScales
from quantkit.runtime import NativeDecoder, native
from quantkit.runtime.dispatch import choose_runner
from quantkit.scheme import KV_PRESETS

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the native library (a C++ compiler)")

PATHS = [
    name for i, name in enumerate(library.ISAS) if library.available() and library.load().qk_isa_available(i)
]
LONG = {"max_position_embeddings": 512}
SCHEMES = {
    "INT8": KV_PRESETS["INT8"],
    "INT4": KV_PRESETS["INT4"],
    "int4-plain": replace(KV_PRESETS["INT4"], rotate=False),
    "FP8": KV_PRESETS["FP8"],
    "FP8_TENSOR": KV_PRESETS["FP8_TENSOR"],
    "INT8-sinks": replace(KV_PRESETS["INT8"], sinks=4),
    "INT4-sinks": replace(KV_PRESETS["INT4"], sinks=37),
    "int4-page": replace(KV_PRESETS["INT4"], sinks=128, rotate=False),
}


def quantized(name, family="llama-gqa", **overrides):
    """(model with the cache, the same without)."""
    model, plain = (tiny_models.FAMILIES[family](**LONG, **overrides) for _ in range(2))
    scheme, scales = SCHEMES[name], None
    if not scheme.dynamic:
        heads = model.config.num_key_value_heads
        shape = (heads, 1, 1) if name == "FP8" else (1,)
        scales = {}
        for i in range(model.config.num_hidden_layers):
            k, v = (torch.linspace(low, 2 * low, shape[0]).view(shape) for low in (0.008, 0.004))
            scales[i] = KVScales(k, v)
    attach(model, scheme, scales)
    return model, plain


@torch.no_grad()
def logits(model, ids):
    return model(ids[None]).logits[0]


def off(one, other):
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())


def assert_same_cache(found, model, plain, ids):
    """Far closer to the model with the quantized cache than that one is to the exact one."""
    wanted = logits(model, ids)
    moved = off(wanted, logits(plain, ids))
    assert moved > 1e-4
    assert off(found, wanted) < max(0.1 * moved, 1e-4), (off(found, wanted), moved)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_reads_the_same_cache(name, path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_ISA", path)
    before = library.load().qk_isa()
    library.load().qk_set_isa(library.ISAS.index(path))
    try:
        model, plain = quantized(name)
        ids = tiny_models.ids(300)[0]
        sequence = native(model).start()
        found = [
            sequence.append(part, len(part)) for part in (ids[:120], *ids[120:140].split(1), ids[140:290])
        ]
        found += [sequence.append(part) for part in ids[290:].split(1)]
        assert_same_cache(torch.cat(found), model, plain, ids)
    finally:
        library.load().qk_set_isa(before)


@pytest.mark.parametrize("name", ["INT8", "INT4", "FP8", "INT4-sinks"])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 100}),
        ("qwen3", {"head_dim": 32}),
        ("llama", {"hidden_size": 96, "num_attention_heads": 48, "num_key_value_heads": 1, "head_dim": 8}),
    ],
    ids=["mha", "window", "norms", "one-kv-head"],
)
def test_heads_windows_and_norms(name, family, overrides):
    model, plain = quantized(name, family, **overrides)
    ids = tiny_models.ids(160)[0]
    sequence = native(model).start()
    found = torch.cat([sequence.append(part, len(part)) for part in (ids[:130], *ids[130:].split(1))])
    assert_same_cache(found, model, plain, ids)


@pytest.mark.parametrize("name", ["INT8", "INT4", "FP8", "INT4-sinks"])
@pytest.mark.parametrize("kept", [140, 20])
def test_truncated_sequences_continue_as_if_nothing_had_been(name, kept):
    model, _ = quantized(name)
    ids = tiny_models.ids(200)[0]
    fresh, used = native(model).start(), native(model).start()
    fresh.append(ids[:kept])
    used.append(ids.flip(0)[:10])
    used.truncate(0)
    used.append(torch.cat([ids[:kept], ids[:50]]))
    used.truncate(kept)
    assert torch.equal(fresh.append(ids[kept:], 60), used.append(ids[kept:], 60))


def test_the_first_tokens_are_exact():
    """As long as there are no others, the cache is the exact one; and one more token is rounded."""
    model, plain = quantized("INT4-sinks")
    ids = tiny_models.ids(60)[0]
    assert off(native(model).start().append(ids[:37], 37), logits(plain, ids[:37])) < 1e-5
    assert off(native(model).start().append(ids[:38], 1), logits(plain, ids[:38])[-1:]) > 1e-5
    memory = native(model).start()
    memory.append(ids[:1])
    layers, heads, d = 3, 2, model.model.layers[0].self_attn.head_dim
    whole = native(quantized("INT4")[0]).start()
    whole.append(ids[:1])
    assert memory.cache_bytes - whole.cache_bytes == layers * heads * 48 * (d + -(-d // 16) * 16) * 4


@pytest.mark.parametrize(("name", "share"), [("INT8", 0.54), ("FP8", 0.5), ("INT4", 0.3)])
def test_memory_is_that_of_codes_and_scales(name, share):
    wide = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model, plain = quantized(name, **wide)
    sequences = [native(model).start(), native(plain, cache_dtype=torch.bfloat16).start()]
    for sequence in sequences:
        sequence.append(tiny_models.ids(256)[0])
    ours, bf16 = (sequence.cache_bytes for sequence in sequences)
    assert ours <= share * bf16, ours / bf16


def test_a_single_token_is_read_as_transformers_reads_it():
    """Attention over one token gives its value back, as the cache has rounded it."""
    model, _ = quantized("INT8")
    ids = tiny_models.ids(40)[0]
    native_first = native(model).start().append(ids[:1])
    assert off(native_first, logits(model, ids[:1])) < 1e-4
    assert isinstance(cache_of(model)().layers[0].entries[0], Entries)


def test_generation_runs_natively_and_says_what_it_cannot():
    model, _ = quantized("INT8")
    runner = choose_runner(model, 4)
    assert (runner.way, runner.reason) == ("native", None)
    assert isinstance(runner.model, NativeDecoder)
    assert runner.model.cache == Cache("int8", False)
    attach(model, replace(KV_PRESETS["INT8"], sinks=4))
    assert choose_runner(model, 4).model.cache == Cache("int8", False, 4)
    for change, says in (
        (
            {"sinks": 129},
            "the native path keeps up to 128 first tokens exact, in INT8 and INT4, not KV int8 token",
        ),
        ({"residual": 32}, "the native path has no cache KV int8 token, last 32 exact"),
    ):
        attach(model, replace(KV_PRESETS["INT8"], **change))
        runner = choose_runner(model, 4)
        assert runner.way == "eager"
        assert runner.reason.startswith(says)


def test_scales_that_are_missing_are_refused():
    _, plain = quantized("INT8")
    made = native(plain)
    with pytest.raises(ValueError, match="an FP8 cache needs the scales of every layer"):
        Decoder(made.tables, cache=Cache("fp8_e4m3"))
    for cache in (Cache("int8", sinks=129), Cache("bf16", sinks=4), Cache("int8", sinks=-1)):
        with pytest.raises(ValueError, match="0 to 128 first tokens stay exact, in a cache of integers; got"):
            Decoder(made.tables, cache=cache)
    with pytest.raises(ValueError, match="unknown cache 'int3'"):
        Decoder(made.tables, cache=Cache("int3"))
