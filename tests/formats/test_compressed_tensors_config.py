"""Configs of llm-compressor (0.14, as it wrote them) are understood, and ours have the same keys and values."""

import json
from pathlib import Path

import pytest
from quantkit_kernels.stored import TABLES

from quantkit.errors import ModelError
from quantkit.formats import compressed_tensors_config as configs
from quantkit.formats.registry import codec
from quantkit.scheme import KV_PRESETS, NUMBERS, PRESETS, Grid, KVScheme, Scheme, integer

CONFIGS = json.loads(Path(__file__).with_name("llmcompressor_configs.json").read_text())
CT = codec("compressed-tensors")
INT8 = NUMBERS["int8"]
FP4, FP8 = NUMBERS["fp4_e2m1"], NUMBERS["fp8_e4m3"]
NVFP4 = Scheme(PRESETS["NVFP4A16"].weights, Grid(FP4, "group", 16, dynamic=True, scale="fp8_e4m3"))
MXFP8 = Scheme(Grid(FP8, "group", 32, scale="e8m0"), Grid(FP8, "group", 32, dynamic=True, scale="e8m0"))
MXFP4 = Scheme(PRESETS["MXFP4A16"].weights, Grid(FP4, "group", 32, dynamic=True, scale="e8m0"))
SCHEMES = {
    "w8a8-int8-dynamic": PRESETS["W8A8"],
    "w8a8-int8-static-asym": PRESETS["W8A8_STATIC"],
    "w4a8-int8": Scheme(integer(4, 32), PRESETS["W8A8"].inputs),
    "fp8-dynamic": PRESETS["FP8_DYNAMIC"],
    "fp8-block": PRESETS["FP8_BLOCK"],
    "mxfp4a16": PRESETS["MXFP4A16"],
    "mxfp8": MXFP8,
    "nvfp4": NVFP4,
    "model-free-fp8-dynamic": PRESETS["FP8_DYNAMIC"],
    "w4a16-sym": Scheme(integer(4, 32)),
    "w8a16-channel": PRESETS["W8A16"],
    "gptq-actorder": Scheme(integer(4, 32)),
}
CACHES = {
    "kv-fp8-tensor": KV_PRESETS["FP8_TENSOR"],
    "kv-fp8-head": KV_PRESETS["FP8"],
    "kv-int8-tensor": KVScheme(Grid(INT8, "tensor"), Grid(INT8, "tensor")),
}


@pytest.mark.parametrize(("name", "scheme"), SCHEMES.items())
def test_schemes_of_llmcompressor(name, scheme):
    assert CT.parse(CONFIGS[name])("model.layers.0.mlp.down_proj") == scheme
    assert CT.parse(CONFIGS[name])("lm_head") is None
    assert CT.kv_scheme(CONFIGS[name]) is None


@pytest.mark.parametrize(("name", "scheme"), CACHES.items())
def test_caches_of_llmcompressor(name, scheme):
    assert CT.kv_scheme(CONFIGS[name]) == scheme
    assert CT.parse(CONFIGS[name])("model.layers.0.self_attn.q_proj") is None


NOT_RUN = [
    ("nvfp4", {"dynamic": True}, r"inputs as fp4_e2m1 with strategy 'tensor_group', dynamic True"),
    ("nvfp4", {"dynamic": False}, r"dynamic False"),
    ("nvfp4", {"group_size": [16]}, r"inputs as fp4_e2m1"),
    ("nvfp4", {"group_size": 32}, r"inputs as fp4_e2m1"),
    ("nvfp4", {"scale_dtype": "torch.uint8"}, r"scale_dtype 'torch.uint8'"),
    ("mxfp8", {"group_size": 64}, r"inputs as fp8_e4m3"),
    ("mxfp8", {"symmetric": False}, r"inputs as fp8_e4m3 .* symmetric False"),
]


@pytest.mark.parametrize(("name", "change", "says"), NOT_RUN, ids=[str(n) for n in range(len(NOT_RUN))])
def test_inputs_that_are_not_run_are_refused_by_name(name, change, says):
    config = json.loads(json.dumps(CONFIGS[name]))
    config["config_groups"]["group_0"]["input_activations"] |= change
    with pytest.raises(ModelError, match=says):
        CT.parse(config)


@pytest.mark.parametrize(
    "name",
    [
        *("w8a8-int8-dynamic", "w8a8-int8-static-asym", "w4a8-int8", "fp8-dynamic", "fp8-block"),
        *("mxfp4a16", "mxfp8", "nvfp4"),
    ],
)
def test_ours_are_what_llmcompressor_writes(name):
    assert CT.config({"a": SCHEMES[name]}, ["lm_head"]) == CONFIGS[name]


def test_a_cache_alone():
    ours = CT.config({}, [], KV_PRESETS["FP8"])
    assert ours == CONFIGS["kv-fp8-head"]
    with pytest.raises(ModelError, match="FP8 with stored scales only, not for KV int8 token"):
        CT.config({}, [], KV_PRESETS["INT8"])


STORED = {name: scheme for name, scheme in PRESETS.items() if name != "NF4"}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("kv", [None, KV_PRESETS["FP8"]])
def test_every_preset_comes_back(name, kv):
    config = CT.config({"a": STORED[name]}, ["lm_head"], kv)
    assert CT.parse(config)("a") == STORED[name]
    assert CT.kv_scheme(config) == kv


def test_fp4_inputs_by_groups_of_32_come_back():
    assert CT.parse(CT.config({"a": MXFP4}, []))("a") == MXFP4


def test_mixed_formats_come_back():
    schemes = dict(zip("abcdefghijklmnopqrstuvwxyz", STORED.values(), strict=False))
    config = CT.config(schemes, [])
    assert config["format"] == "mixed-precision"
    assert {name: CT.parse(config)(name) for name in schemes} == schemes
    keys = {frozenset(group) for group in config["config_groups"].values()}
    assert keys == {frozenset(CONFIGS["fp8-block"]["config_groups"]["group_0"])}


def test_a_minimal_config_of_another_tool():
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"x": group}}
    assert CT.parse(config)("a") == PRESETS["W8A8"]


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (PRESETS["NF4"], "no format for W4A16 nf4 g64"),
        (Scheme(Grid(NUMBERS["fp4_e2m1"], "group", 64, scale="e8m0")), "no format for"),
        (Scheme(integer(4, symmetric=False), PRESETS["W4A8"].inputs), "no format for"),
    ],
)
def test_what_has_no_format(scheme, says):
    with pytest.raises(ModelError, match=says):
        CT.config({"a": scheme}, [])


def test_memory_takes_what_kernels_have_tables_of():
    assert {*configs._IN_KERNELS} == {*TABLES}


W4, W8 = Scheme(integer(4, 32)), Scheme(integer(8, 32))


def experts(layer, scheme, *leaves):
    return {f"model.layers.{layer}.moe.experts.{e}.{leaf}": scheme for e in range(3) for leaf in leaves}


@pytest.mark.parametrize(
    ("schemes", "targets"),
    [
        (
            experts(0, W4, "w1", "w2", "w3") | experts(1, W4, "w1", "w2", "w3"),
            [r"re:.*experts\.\d+\.(down_proj|gate_proj|up_proj|w1|w2|w3)$"],
        ),
        (
            experts(0, W4, "up_proj", "down_proj") | experts(1, W8, "up_proj", "down_proj"),
            [r"re:model\.layers\.0\.moe\.experts\.\d+\.(down_proj|gate_proj|up_proj)$"],
        ),
        (
            experts(0, W4, "up_proj") | experts(0, W8, "down_proj"),
            [f"model.layers.0.moe.experts.{e}.up_proj" for e in range(3)],
        ),
    ],
    ids=["all alike", "alike in a layer", "mixed"],
)
def test_experts_of_one_scheme_are_targeted_by_a_pattern(schemes, targets):
    schemes = schemes | {"model.layers.0.q_proj": W8, "model.layers.0.moe.experts_norm.0.w1": W8}
    written = configs.written_config(schemes, [])
    assert next(iter(written["config_groups"].values()))["targets"] == targets
    found = configs.parsed_config(written)
    assert {name: found(name) for name in schemes} == schemes
    assert found("model.layers.0.moe.experts.2.gate_proj") in (W4, None)
