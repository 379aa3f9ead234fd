"""Checkpoints of other tools are judged by what engines say of their formats, not as compressed-tensors."""

import json
from pathlib import Path

import pytest

from quantkit.checkpoint.inspect import inspect_checkpoint
from quantkit.preflight.check import outlook, preflight, verdicts
from quantkit.preflight.subject import Linear, Subject
from quantkit.preflight.target import parse_target
from quantkit.scheme import NUMBERS, PRESETS, Grid, Scheme, integer

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}


def held(config, scheme=None, shape=(1024, 1024)):
    """A model of one linear in the format of a `quantization_config`, whose scheme is given or that of the config."""
    scheme = scheme or Scheme(integer(config["bits"], 128, config.get("sym", "zero_point" not in config)))
    kind = config["quant_method"]
    linears = [Linear("model.layers.0.mlp.up_proj", shape, scheme, kind)]
    return Subject(linears, {"model_type": "llama"}, config)


def rules(subject, target):
    return [finding.rule for finding in preflight(subject, parse_target(target))]


TINY = {"kernel"}  # of fixtures: linears of 64 columns are no whole tiles
JUDGED = [
    ("gptq4-desc-act", "vllm,gpu=sm90", {"order"}),
    ("gptq4-desc-act", "vllm,gpu=cpu", {"order"}),
    ("gptq4-desc-act", "sglang,gpu=sm90", TINY),
    ("gptq4-desc-act", "sglang,gpu=cpu-amx", {"order"}),
    ("gptq4-desc-act", "transformers", set()),
    ("gptq4-desc-act", "quantkit", set()),
    ("gptq4-sym", "vllm,gpu=sm90", set()),
    ("gptq4-sym", "vllm,gpu=cpu", set()),
    ("gptq3-sym", "vllm", {"kernel"}),
    ("gptq3-sym", "sglang,gpu=sm80", set()),
    ("gptq4-v2-asym", "vllm", {"kernel"}),
    ("gptq4-v2-asym", "sglang,gpu=sm80", set()),
    ("gptq4-v2-asym", "transformers", set()),
    ("awq4-gemm", "vllm,gpu=sm75", set()),
    ("awq4-gemm", "vllm,gpu=cpu", set()),
    ("awq4-gemm", "sglang,gpu=sm75", set()),
    ("autoround-int4", "vllm", set()),
    ("autoround-int4", "sglang,gpu=cpu-amx", {"kernel"}),
    ("bnb-nf4", "vllm", {"format"}),
    ("bnb-nf4", "sglang,gpu=sm80", set()),
    ("bnb-nf4", "sglang,gpu=cpu", {"kernel"}),
    ("bnb-nf4", "transformers", set()),
    ("modelopt-fp8-kv-fp8", "vllm,gpu=sm90", set()),
    ("modelopt-fp8-kv-fp8", "transformers", {"format"}),
]


@pytest.mark.parametrize(("name", "target", "wanted"), JUDGED, ids=[f"{n}-{t}" for n, t, _ in JUDGED])
def test_checkpoints_of_other_tools_are_judged_by_their_own_rules(name, target, wanted):
    asked = inspect_checkpoint(FIXTURES / name, target=parse_target(target))["target"]
    assert {finding["rule"] for finding in asked["findings"]} == wanted
    assert (asked["outlook"] is None) == bool(wanted)


def test_who_loads_a_checkpoint_of_another_tool_is_what_was_judged():
    def told(name):
        report = inspect_checkpoint(FIXTURES / name)
        return {each["name"]: each["loads"] for each in report["loaders"]}, report

    loads, report = told("gptq4-desc-act")
    assert loads == {"quantkit": True, "transformers": True, "vLLM": False}
    assert "desc_act with groups of 32" in report["loaders"][2]["how"]
    assert "with the packages optimum and gptqmodel" in report["loaders"][1]["how"]
    assert any("desc_act" in engine["said"] for engine in report["engines"] if not engine["runs"])
    assert told("modelopt-fp8-kv-fp8")[0] == {"quantkit": True, "transformers": False, "vLLM": True}
    assert told("bnb-nf4")[0] == {"quantkit": True, "transformers": True, "vLLM": False}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"desc_act": True}, ["order"]),
        ({"desc_act": True, "group_size": -1}, []),
        ({"dynamic": {r"+:.*up_proj": {"desc_act": True}}}, ["order"]),
        ({"dynamic": {r"+:.*up_proj": {"desc_act": True, "group_size": -1}}}, []),
        ({"dynamic": {r"-:.*up_proj": {"desc_act": True}}}, []),
        ({"desc_act": True, "group_size": -1, "dynamic": {".*": {"group_size": 32}}}, ["order"]),
        ({"dynamic": [3], "desc_act": False}, []),
    ],
)
def test_vllm_takes_no_groups_of_columns_out_of_order(config, wanted):
    """As its `normalize_and_validate_gptq_desc_act` has it."""
    assert rules(held(GPTQ | config), "vllm,gpu=sm90") == wanted
    assert rules(held(GPTQ | config), "sglang,gpu=sm90") == []


@pytest.mark.parametrize(
    ("bits", "symmetric", "where"),
    [(4, True, {"sm80", "cpu"}), (8, True, {"sm80"}), (4, False, set()), (3, True, set()), (2, True, set())],
)
def test_the_bits_of_gptq_that_vllm_reads(bits, symmetric, where):
    subject = held(GPTQ | {"bits": bits, "sym": symmetric})
    assert {gpu for gpu in ("sm80", "cpu") if not rules(subject, f"vllm,gpu={gpu}")} == where
    assert rules(subject, "sglang,gpu=sm80") == []


@pytest.mark.parametrize("size", [16, 256])
def test_gptq_in_groups_that_marlin_has_not_is_refused(size):
    subject = held(GPTQ | {"group_size": size}, Scheme(integer(4, size)))
    said = preflight(subject, parse_target("vllm,gpu=sm90"))
    assert "it reads group_size channel, 32, 64, 128" in said[0].numbers
    assert rules(subject, "sglang,gpu=sm90") == []  # its kernel for these files


def test_awq_goes_to_a_kernel_of_its_own_where_marlin_does_not_fit():
    odd = held(AWQ, shape=(1032, 1152))
    assert rules(odd, "sglang,gpu=sm80") == rules(odd, "vllm,gpu=sm75") == []
    assert rules(held(AWQ, Scheme(integer(8, 128, False))), "vllm") == ["kernel"]
    symmetric = held(GPTQ, shape=(1032, 1152))
    assert rules(symmetric, "sglang,gpu=sm80") == ["kernel"]


def test_autoround_holds_the_tensors_of_gptq_or_of_awq():
    four = Scheme(integer(4, 128, False))
    assert rules(held(ROUND | {"sym": False}, four), "vllm,gpu=sm80") == ["kernel"]
    packed = ROUND | {"sym": False, "packing_format": "auto_round:auto_awq"}
    assert rules(held(packed, four), "vllm,gpu=sm80") == []
    low = held(ROUND | {"bits": 3})
    assert "with the package humming" in outlook(low, parse_target("vllm,gpu=sm80"))
    assert rules(low, "vllm,gpu=cpu") == ["kernel"]


def test_what_a_config_lacks_is_named():
    config = {key: value for key, value in GPTQ.items() if key not in ("sym", "desc_act")}
    found = preflight(held(config), parse_target("vllm,gpu=sm80"))
    assert "lacks desc_act, sym" in found[0].numbers
    older = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True}
    assert rules(held(older, Scheme(integer(4, 128, False))), "vllm,gpu=sm80") == []


def test_what_transformers_gets_wrong_of_gptq():
    assert rules(held(GPTQ | {"dynamic": {".*up_proj": {"bits": 8}}}), "transformers") == ["config"]
    assert rules(held(GPTQ | {"dynamic": {"-:.*up_proj": {}}}), "transformers") == []
    asymmetric = GPTQ | {"sym": False, "checkpoint_format": "gptq"}
    assert rules(held(asymmetric), "transformers") == ["config"]
    assert rules(held(asymmetric | {"meta": {"quantizer": ["gptqmodel:7.6.0"]}}), "transformers") == []
    assert rules(held(asymmetric | {"checkpoint_format": "gptq_v2"}), "transformers") == []


def test_modelopts_patterns_are_not_read_as_those_of_compressed_tensors():
    config = json.loads((FIXTURES / "modelopt-fp8-kv-fp8/config.json").read_text())["quantization_config"]
    config["ignore"] = ["*lm_head*", "*up_proj*"]
    subject = held(config, PRESETS["FP8"])
    assert rules(subject, "vllm,gpu=sm90") == []


def test_a_tool_that_no_engine_reads_is_left_to_us():
    nf4 = Scheme(Grid(NUMBERS["nf4"], "group", 64))
    subject = held({"quant_method": "hqq"}, nf4)
    found = preflight(subject, parse_target("vllm"))
    assert [each.rule for each in found] == ["format"]
    assert found[0].numbers == "vLLM has no reader of files by HQQ"
    assert found[0].remedy.startswith("serve it with quantkit, or quantize the original model")
    assert [runs for runs, _ in verdicts(subject)].count(True) == 1
