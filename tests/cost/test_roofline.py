"""The roofline against published tables, and the rules that hold whatever the model."""

from dataclasses import replace

import published
import pytest

from quantkit.cost.attention import Attention, entry_bits, find_attention
from quantkit.cost.hardware import Hardware, known
from quantkit.cost.model import find_model
from quantkit.cost.roofline import Step, bounds, decode, operators, prefill, seconds
from quantkit.models.headers import read_checkpoint
from quantkit.plan import build_plan
from quantkit.recipe.recipe import load_recipe
from quantkit.scheme import KV_PRESETS

A6000 = replace(known()["a6000"], peak={"fp16": 155e12, "int8": 310e12})  # as the survey rounds it


def model_of(tmp_path, config, recipe="kv-fp8", *overrides, exact_cache=True):
    published.write(tmp_path / "m", config)
    headers = read_checkpoint(tmp_path / "m")
    found = find_model(build_plan(load_recipe(recipe, overrides), headers), headers)
    return replace(found, kv=None) if exact_cache else found


def by_name(model, step, hardware=A6000):
    return {each.operator.name.rpartition(".")[2]: each for each in bounds(model, step, hardware)}


# Table 1 of arXiv 2402.16363: (step, operator, operations, bytes, operations per byte, bound, attainable operations/s)
TABLE_1 = [
    *(("prefill", f"{p}_proj", 69e9, 67e6, 1024, "compute", 155e12) for p in "qkvo"),
    *(("prefill", f"{p}_proj", 185e9, 152e6, 1215, "compute", 155e12) for p in ("gate", "up", "down")),
    *(("prefill", name, 34e9, 302e6, 114, "memory", 87e12) for name in ("qk", "sv")),
    ("prefill", "softmax", 671e6, 537e6, 1.25, "memory", 960e9),
    *(("decode", f"{p}_proj", 34e6, 34e6, 1, "memory", 768e9) for p in "qkvo"),
    *(("decode", f"{p}_proj", 90e6, 90e6, 1, "memory", 768e9) for p in ("gate", "up", "down")),
    *(("decode", name, 17e6, 17e6, 0.99, "memory", 762e9) for name in ("qk", "sv")),
    ("decode", "softmax", 328e3, 262e3, 1.25, "memory", 960e9),
    ("decode", "norm", 29e3, 16e3, 1.75, "memory", 1344e9),
    ("decode", "add", 4e3, 16e3, 0.25, "memory", 192e9),
]


def test_table_1_of_the_survey_is_reproduced(tmp_path):
    model = model_of(tmp_path, published.LLAMA_2_7B)
    steps = {"prefill": prefill(2048, fused=False), "decode": decode(2048, fused=False)}
    found = {name: by_name(model, step) for name, step in steps.items()}
    for step, name, operations, n_bytes, intensity, by, attainable in TABLE_1:
        bound = found[step][name]
        one = bound.operator
        got = (one.operations, one.n_bytes, one.intensity, bound.attainable)
        # the table has two or three digits, and cuts some of them off
        assert got == pytest.approx((operations, n_bytes, intensity, attainable), rel=0.025), (step, name)
        assert bound.by == by, (step, name)
        assert one.count == (64 if name in ("norm", "add") else 32)


@pytest.mark.parametrize(("recipe", "ceiling"), [("kv-fp8", 286), ("w8a16-rtn", 535), ("w4a16-rtn", 924)])
def test_decoding_llama_3_8b_on_4300_gb_per_s_has_the_ceiling_counted_by_hand(tmp_path, recipe, ceiling):
    """Weights of the blocks as stored and the bf16 head, read once per token: 15.0, 8.0 and 4.65 GB."""
    device = Hardware("x", "x", None, 4.3e12, {"fp16": 790e12}, "measured")
    found = bounds(model_of(tmp_path, published.LLAMA_3_8B, recipe), decode(1), device)
    linears = [each for each in found if each.operator.name.endswith(("_proj", "lm_head"))]
    assert 1 / seconds(linears) == pytest.approx(ceiling, rel=0.01)
    assert 1 / seconds(found) == pytest.approx(ceiling, rel=0.02)


def test_decoding_mistral_7b_at_4096_tokens_moves_what_yalm_counts(tmp_path):
    """15,020,875,776 bytes, of which yalm reads the whole table of embeddings and this one row: 67.1 tokens/s."""
    found = bounds(model_of(tmp_path, published.MISTRAL_7B), decode(4096), known()["rtx4090"])
    moved = sum(each.operator.count * each.operator.n_bytes for each in found) + 2 * 32000 * 4096
    assert moved == pytest.approx(15_020_875_776, rel=2e-3)
    assert 1 / seconds(found) == pytest.approx(67.1 * 15.02 / 14.76, rel=5e-3)


def test_a_token_of_a_mixture_reads_its_experts_and_a_large_batch_all_of_them(tmp_path):
    config = published.QWEN3_235B | {"num_hidden_layers": 2}
    model = model_of(tmp_path, config)
    weight = 2 * 1536 * 4096
    for batch, reached in ((1, 8), (2, 128 * (1 - (15 / 16) ** 2)), (10_000, 128)):
        one = by_name(model, decode(100, batch))["up_proj"].operator
        assert one.count == 2
        assert one.operations == 2 * 1536 * 4096 * 8 * batch
        assert one.n_bytes - 8 * batch * 2 * (1536 + 4096) == pytest.approx(reached * weight)
    router = by_name(model, decode(100))["gate"].operator
    assert router.operations == 2 * 128 * 4096


def test_experts_of_two_schemes_share_the_tokens(tmp_path):
    config = published.QWEN3_235B | {"num_hidden_layers": 1}
    some = "rules=[{match: '*experts.?.*', bits: 8}]"  # ten of the 128
    model = model_of(tmp_path, config, "w4a16-rtn", some)
    parts = [each for each in operators(model, decode(100)) if each.name.endswith("experts.*.up_proj")]
    assert len(parts) == 2
    assert sum(each.operations for each in parts) == pytest.approx(2 * 1536 * 4096 * 8)
    assert min(each.operations for each in parts) == pytest.approx(2 * 1536 * 4096 * 8 * 10 / 128)


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("w4a16-rtn", "fp16"),
        ("w4a8-gptq", "int8"),
        ("w8a8-int8-dynamic", "int8"),
        ("w8a8-fp8-dynamic", "fp8"),
    ],
)
def test_a_linear_computes_in_the_numbers_of_its_inputs(tmp_path, recipe, kind):
    config = published.LLAMA_2_7B | {"num_hidden_layers": 1}
    model = model_of(tmp_path, config, recipe)
    found = by_name(model, prefill(2048), known()["h100"])
    assert found["q_proj"].operator.kind == kind
    assert found["q_proj"].attainable == known()["h100"].peak[kind]
    assert found["qk"].operator.kind == found["lm_head"].operator.kind == "fp16"


def test_fused_attention_moves_no_scores_and_counts_half_the_square(tmp_path):
    model = model_of(tmp_path, published.LLAMA_2_7B | {"num_hidden_layers": 1})
    fused, apart = by_name(model, prefill(2048)), by_name(model, prefill(2048, fused=False))
    assert fused["softmax"].operator.n_bytes == 0
    assert fused["softmax"].operator.intensity is None
    assert fused["qk"].operator.n_bytes == 2 * 2 * 2048 * 4096
    assert fused["qk"].operator.operations == apart["qk"].operator.operations * 2049 / 4096
    assert (
        by_name(model, decode(2048))["qk"].operator.operations
        == by_name(model, decode(2048, fused=False))["qk"].operator.operations
    )


def test_pairs_are_those_that_a_causal_mask_with_a_window_leaves():
    for window in (None, 1, 3, 7, 20):
        one = Attention(1, 1, 8, 8, window)
        for context in (1, 2, 7, 13):
            for queries in range(1, context + 1):
                rows = [
                    [k for k in range(context) if k <= q and (window is None or q - k < window)]
                    for q in range(context - queries, context)
                ]
                assert one.pairs(queries, context) == sum(map(len, rows))
                assert one.seen(queries, context) == len(set().union(*rows))


@pytest.mark.parametrize(
    ("preset", "n_bytes"), [(None, 256), ("INT8", 136), ("INT4", 72), ("FP8", 128), ("FP8_TENSOR", 128)]
)
def test_a_cached_token_of_a_head_takes_the_bytes_of_the_docs(preset, n_bytes):
    kv = None if preset is None else KV_PRESETS[preset]
    assert Attention(4, 1, 64, 64).cache_bytes(kv, 1000) == 1000 * n_bytes


def test_the_newest_tokens_of_kivi_are_exact():
    kv, one = KV_PRESETS["KIVI4"], Attention(4, 2, 64, 64)
    assert one.cache_bytes(kv, 100) == 100 * 2 * 256
    assert one.cache_bytes(kv, 1128, batch=3) == 3 * 2 * (128 * 256 + 1000 * (40 + 40))
    assert entry_bits(kv.keys, 64) == 4 + 1


@pytest.mark.parametrize(
    ("config", "token"),
    [(published.LLAMA_2_7B, 512), (published.LLAMA_3_8B, 128), (published.LLAMA_3_70B, 320)],
)
def test_the_cache_of_published_models(tmp_path, config, token):
    """KiB per token in 16 bits, as the papers on KV caches give them."""
    layers = find_attention(config, config["num_hidden_layers"])
    assert sum(each.cache_bytes(None, 4096) for each in layers) == 4096 * token * 1024


@pytest.mark.parametrize(
    ("more", "windows"),
    [
        ({"sliding_window": 512}, [512] * 6),
        ({"sliding_window": 512, "use_sliding_window": False}, [None] * 6),
        ({"sliding_window": 512, "sliding_window_pattern": 3}, [512, 512, None] * 2),
        ({"sliding_window": 512, "max_window_layers": 4}, [None] * 4 + [512] * 2),
        (
            {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 3},
            [512, None] * 3,
        ),
        ({"attention_chunk_size": 64, "layer_types": ["chunked_attention"] * 6}, [64] * 6),
        ({"layer_types": ["linear_attention", "full_attention"] * 3}, [0, None] * 3),
    ],
)
def test_windows_by_config(more, windows):
    found = find_attention(published.LLAMA_2_7B | more, 6)
    assert [0 if each is None else each.window for each in found] == windows


def test_a_window_bounds_the_cache_and_the_reads():
    one = Attention(8, 2, 64, 64, window=100)
    assert one.cache_bytes(None, 5000) == one.cache_bytes(None, 100) == 100 * 2 * 256
    assert one.cache_bytes(None, 50) == 50 * 2 * 256


def test_latent_attention_caches_one_vector_and_decodes_in_its_space():
    """DeepSeek-V3: 512 + 64 channels per token and block instead of 128 heads of 192 + 128."""
    more = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    config = published.LLAMA_2_7B | {"num_attention_heads": 128, "hidden_size": 7168} | more
    (one,) = find_attention(config, 1)
    assert one.cache_bytes(KV_PRESETS["FP8"], 1000) == 1000 * 576 * 2
    assert (one.heads, one.key, one.value) == (128, 192, 128)
    assert one.absorbed() == replace(one, kv_heads=1, key=576, value=512)


def test_latent_attention_reads_its_cache_once_per_token(tmp_path):
    model = model_of(tmp_path, published.LLAMA_2_7B | {"num_hidden_layers": 1})
    model = replace(model, attention=(Attention(128, 128, 192, 128, None, 512, 64),))
    found = {each.name: each for each in operators(model, decode(1000))}
    assert found["qk"].n_bytes == 2 * (128 * 576 + 1000 * 576)
    assert found["sv"].n_bytes == 2 * 128 * 512
    assert found["qk"].operations == 2 * 1000 * 128 * 576
    assert {each.name: each for each in operators(model, prefill(1000))}["qk"].operations == (
        2 * 128 * 192 * 1000 * 1001 // 2
    )


def test_a_quantized_cache_is_read_in_its_own_bytes(tmp_path):
    config = published.LLAMA_2_7B | {"num_hidden_layers": 1}
    narrow = model_of(tmp_path, config, exact_cache=False)
    read = {each.name: each for each in operators(narrow, decode(1000))}["sv"].n_bytes
    assert read == 2 * 4096 + 1000 * 4096


def test_a_tied_head_is_the_table_of_embeddings(tmp_path):
    config = published.LLAMA_2_7B | {"num_hidden_layers": 1}
    published.write(tmp_path / "m", config)
    headers = read_checkpoint(tmp_path / "m")
    del headers.tensors["lm_head.weight"]
    headers.config["tie_word_embeddings"] = True
    model = find_model(build_plan(load_recipe("w4a16-rtn"), headers), headers)
    assert model.head is not None
    assert model.head.name == "model.embed_tokens"
    assert model.head.shape == (32000, 4096)


def test_a_step_computes_the_head_for_the_last_tokens_only(tmp_path):
    model = model_of(tmp_path, published.LLAMA_2_7B | {"num_hidden_layers": 1})
    for step in (prefill(100, 3), decode(100, 3), Step(7, 100, 3)):
        assert operators(model, step)[-1].operations == 2 * 32000 * 4096 * 3
