"""Who can load a checkpoint: decided by its schemes and by transformers' own code, not by a list of families."""

import pytest

from quantkit.checkpoint.loaders import PLAIN, TRANSFORMERS, loaders, reads_weight
from quantkit.scheme import INT8_TOKEN, KV_PRESETS, NUMBERS, PRESETS, Grid, KVScheme, Scheme, integer

LINEARS = ("q_proj", "o_proj", "c_proj", "c_attn", "query_key_value", "down_proj", "fc1", "dense")
FOUR = Scheme(integer(4, 128))
MXFP8 = Scheme(Grid(NUMBERS["fp8_e4m3"], "group", 32, scale="e8m0"))


def by_name(model_type, *schemes):
    layers = {f"model.layers.{i}.mlp.{leaf}": s for i, s in enumerate(schemes) for leaf in LINEARS}
    return {each.name: each for each in loaders(model_type, layers)}


@pytest.mark.parametrize(
    ("model_type", "found"),
    [
        ("gpt_bigcode", "c_proj.weight"),
        ("nanochat", "o_proj.weight"),
        ("falcon", "self.weight in FalconLinear (its linear class)"),
        ("llama", None),
        ("qwen3", None),
        ("gemma2", None),
        ("opt", None),
        ("gpt_neox", None),
        ("bloom", None),
        ("no-such-type", None),
        ("../llama", None),
    ],
)
def test_which_code_reads_a_weight_itself(model_type, found):
    assert reads_weight(model_type, LINEARS) == found


def test_a_linear_that_is_not_quantized_may_be_read():
    assert reads_weight("nanochat", ["down_proj"]) is None


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "nanochat", "falcon"])
def test_plain_transformers_needs_dequantize_for_code_that_reads_weights(model_type):
    loader = by_name(model_type, FOUR)[TRANSFORMERS]
    assert loader.loads
    assert "dequantize=True" in loader.how
    assert "reads" in loader.needs


def test_plain_transformers_and_asymmetric_or_several_schemes():
    assert by_name("llama", FOUR)[TRANSFORMERS].needs is None
    assert "dequantize=True" in by_name("llama", Scheme(integer(4, 128, False)))[TRANSFORMERS].how
    assert by_name("llama", FOUR, Scheme(integer(8, None)))[TRANSFORMERS].loads
    assert not by_name("llama", FOUR, Scheme(integer(8, None, False)))[TRANSFORMERS].loads
    assert not by_name("gpt2", FOUR)[TRANSFORMERS].loads


@pytest.mark.parametrize(
    ("grid", "own_kernels"),
    [
        (integer(4, 128), True),
        (integer(4, 128, False), True),
        (integer(8, None), True),
        (integer(8, 128, False), False),
        (integer(4, 96), False),
        (integer(4, 16), False),
        (integer(3, 128), False),
        (integer(2, 64, False), False),
    ],
    ids=str,
)
def test_vllm_takes_all_of_2_to_8_bits_and_some_only_with_its_optional_kernels(grid, own_kernels):
    loader = by_name("llama", Scheme(grid))["vLLM"]
    assert loader.loads
    assert (loader.needs is None) == own_kernels


def test_without_quantized_layers_everyone_loads():
    assert [each.loads for each in loaders("llama", {})] == [True, True]


EIGHT = ["W8A8", "W8A8_STATIC", "FP8_DYNAMIC", "FP8", "FP8_BLOCK", "W8A16_FP8"]


@pytest.mark.parametrize("preset", EIGHT)
def test_eight_bit_inputs_and_fp8_weights_load_everywhere(preset):
    found = by_name("llama", PRESETS[preset])
    assert all(each.loads and each.needs is None for each in found.values())


@pytest.mark.parametrize("preset", EIGHT)
def test_what_dequantize_would_drop_is_said_where_nobody_needs_it(preset):
    drops = "its dequantize=True drops the rounding of inputs"
    rounds = PRESETS[preset].inputs is not None
    assert by_name("llama", PRESETS[preset])[TRANSFORMERS].shown == (f"{PLAIN}; {drops}" if rounds else PLAIN)
    plain = loaders("llama", {"a": PRESETS[preset]}, KV_PRESETS["FP8"])[1].shown
    also = (
        f"{drops} and that of the cache" if rounds else "its dequantize=True drops the rounding of the cache"
    )
    assert plain.endswith(also)


@pytest.mark.parametrize("scheme", [PRESETS["NVFP4A16"], MXFP8], ids=str)
def test_weights_with_short_scales_run_in_bfloat16_only_in_plain_transformers(scheme):
    found = by_name("llama", scheme)
    assert found[TRANSFORMERS].needs == "in bfloat16 only"
    assert found["vLLM"].needs is None


def test_what_vllm_has_no_kernels_for_is_said():
    assert "kernels for W4A8 g128 sym" in by_name("llama", PRESETS["W4A8"])["vLLM"].needs
    grouped = Grid(INT8_TOKEN.number, "group", 128, dynamic=True)
    for scheme in (Scheme(integer(8, None), grouped), Scheme(integer(4), PRESETS["FP8"].inputs)):
        assert not by_name("llama", scheme)["vLLM"].loads


def test_dequantize_drops_the_rounding_of_inputs():
    assert "leaves inputs as they are" in by_name("nanochat", PRESETS["W8A8"])[TRANSFORMERS].needs


def test_a_stored_cache_says_who_reads_it():
    fp8, int8 = KV_PRESETS["FP8"], KVScheme(*[Grid(NUMBERS["int8"], "tensor")] * 2)
    ours, plain, engine = loaders("", {}, fp8)
    assert ours.loads
    assert plain.name == TRANSFORMERS
    assert plain.needs == "its cache is rounded and takes the memory of an exact one"
    assert "FlashAttention 3" in engine.needs
    assert engine.how == "vllm serve path"
    assert loaders("", {}, KV_PRESETS["FP8_TENSOR"])[2].needs is None
    assert not loaders("", {}, int8)[2].loads
    asymmetric = {"a": PRESETS["W4A16_ASYM"]}
    assert "dequantize drops its scales" in loaders("", asymmetric, fp8)[1].needs


@pytest.mark.parametrize("schemes", [{}, {"a": FOUR}], ids=["weights: none", "W4A16"])
def test_a_dynamic_cache_is_exact_in_transformers_and_an_option_of_vllm(schemes):
    _, plain, engine = loaders("", schemes, KV_PRESETS["INT8"])
    assert plain.name == (TRANSFORMERS if schemes else "transformers")
    assert plain.shown == f"with an exact cache: {PLAIN}"
    assert engine.how == "vllm serve path --kv-cache-dtype int8_per_token_head"
    _, _, without = loaders("", schemes, KV_PRESETS["KIVI2"])
    assert without.loads
    assert "with an exact cache" in without.needs
    assert without.how == "vllm serve path"
