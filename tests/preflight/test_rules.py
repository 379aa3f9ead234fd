"""The rules of the preflight: what is fine stays without a word, and each fact of the tables decides a case."""

import subprocess
import sys
from dataclasses import replace

import pytest
from engine_subjects import FOUR, PRESETS, llama, subject

from quantkit.errors import RecipeError
from quantkit.preflight.check import outlook, preflight, verdicts
from quantkit.preflight.kernels import devices_for
from quantkit.preflight.subject import Linear
from quantkit.preflight.tables import FUSIONS, KERNELS, RENAMED, ROW_PARALLEL
from quantkit.preflight.target import DEVICES, ENGINES, Target, parse_target
from quantkit.scheme import KV_PRESETS, NUMBERS, Grid, Scheme, integer

GPUS = {"sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120"}


NVFP4 = Scheme(PRESETS["NVFP4A16"].weights, replace(PRESETS["NVFP4A16"].weights, dynamic=True))
_BY_32 = Grid(NUMBERS["fp8_e4m3"], "group", 32, scale="e8m0")
MXFP8 = Scheme(_BY_32, replace(_BY_32, dynamic=True))


def rules(checkpoint, target):
    return [finding.rule for finding in preflight(checkpoint, parse_target(target))]


@pytest.mark.parametrize(
    "target",
    ["vllm,gpu=sm80", "vllm,tensor_parallel=4,gpu=sm90", "vllm,gpu=cpu", "sglang,gpu=sm90", "quantkit"],
)
def test_the_usual_checkpoint_is_refused_nowhere(target):
    assert preflight(llama(blocks=2), parse_target(target)) == []


@pytest.mark.parametrize(
    ("scheme", "where"),
    [
        (Scheme(integer(4, 128)), GPUS | {"cpu", "cpu-amx"}),
        (Scheme(integer(4, None, False)), GPUS | {"cpu", "cpu-amx"}),
        (Scheme(integer(8, 128)), GPUS),
        (Scheme(integer(8, 128, False)), {"sm90"}),  # Machete; elsewhere Humming
        (Scheme(integer(4, 256)), GPUS | {"cpu", "cpu-amx"}),  # Triton W4A16
        (Scheme(integer(8, 256)), set()),
        (Scheme(integer(4, 96)), {"cpu", "cpu-amx"}),
        (Scheme(integer(3, 128)), set()),
        (PRESETS["W8A8"], set(DEVICES)),
        (PRESETS["W4A8"], {"cpu", "cpu-avx2", "cpu-amx"}),
        (PRESETS["FP8"], GPUS | {"cpu-amx"}),
        (PRESETS["FP8_DYNAMIC"], set(DEVICES)),
        (PRESETS["FP8_BLOCK"], GPUS | {"cpu-amx"}),
        (PRESETS["W8A16_FP8"], GPUS),
        (PRESETS["NVFP4A16"], GPUS),
        (PRESETS["MXFP4A16"], GPUS - {"sm75"}),
        (NVFP4, GPUS),  # with Marlin, which leaves inputs as they are, where nothing else runs
        (MXFP8, GPUS),
        (Scheme(NVFP4.weights, MXFP8.inputs), set()),
        (Scheme(PRESETS["FP8"].weights, PRESETS["W8A8"].inputs), set()),
    ],
    ids=lambda value: None if isinstance(value, set | frozenset) else str(value),
)
def test_where_vllm_has_kernels_of_its_own(scheme, where):
    assert set(devices_for(scheme, "vllm", optional=False)) == where


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_bit_width_runs_on_cuda_with_humming(bits, symmetric):
    assert set(devices_for(Scheme(integer(bits, 96, symmetric)), "vllm")) >= GPUS


def test_what_runs_with_an_optional_package_alone_says_so():
    odd = llama(Scheme(integer(8, 128, False)))
    assert outlook(odd, Target("vllm", 1, "sm80")).endswith("would refuse, with the package humming")
    assert outlook(odd, Target("vllm", 1, "sm90")).endswith("would refuse")
    assert verdicts(odd)[0][1].startswith("vLLM on sm80 (with the package humming), sm90, sm100 (with")


def test_groups_follow_the_side_that_is_split():
    assert rules(llama(hidden=1024, inner=2048), "vllm,tensor_parallel=16") == [
        "groups"
    ]  # o_proj: 64 columns
    assert rules(llama(hidden=1024, inner=2048), "vllm,tensor_parallel=8") == []
    assert (
        rules(llama(Scheme(integer(4, None)), inner=640), "vllm,tensor_parallel=2") == []
    )  # a channel is not cut


def test_heads_of_keys_and_values_divide_or_are_copied():
    config = {"num_attention_heads": 8, "num_key_value_heads": 2}
    assert rules(llama(config=config), "vllm,tensor_parallel=4") == []
    assert rules(llama(config=config | {"num_key_value_heads": 3}), "vllm,tensor_parallel=2") == ["heads"]


def test_zero_points_are_cut_at_words():
    scheme = Scheme(integer(4, 128, False))
    linear = Linear("model.layers.0.mlp.gate_proj", (1000, 1024), scheme)
    assert rules(subject([linear]), "vllm,gpu=sm90") == []
    assert rules(subject([replace(linear, shape=(1004, 1024))]), "vllm,gpu=sm90") == ["zero points"]
    assert rules(subject([linear]), "vllm,gpu=sm90,tensor_parallel=2") == ["zero points"]


def test_blocks_of_fused_linears_end_with_them():
    wide = llama(PRESETS["FP8_BLOCK"], hidden=1024, inner=1984)
    assert rules(wide, "vllm,gpu=sm90") == ["blocks"]  # gate_proj: 15.5 blocks before up_proj
    assert "gate_proj" in str(preflight(wide, Target("vllm", 1, "sm90"))[0])


def test_ignore_must_end_where_the_name_ends():
    linears = [*llama().linears, Linear("model.layers.0.mlp.gate", (8, 1024), None)]
    assert rules(subject(linears, ignore=["re:.*mlp.gate$"]), "vllm,gpu=sm90") == []
    found = preflight(subject(linears, ignore=["re:.*mlp.gate"]), Target("vllm", 1, "sm90"))
    assert [finding.rule for finding in found] == ["names"]
    assert "gate_proj" in str(found[0])
    assert "'re:.*mlp.gate$'" in str(found[0])


def test_the_class_linear_does_not_mean_an_output_head():
    linears = [*llama().linears, Linear("lm_head", (1024, 1024), FOUR)]
    assert rules(subject(linears, targets=["Linear"]), "vllm,gpu=sm90") == ["names"]
    assert rules(subject(linears, targets=["Linear", "lm_head"]), "vllm,gpu=sm90") == []
    assert rules(subject(linears), "vllm,gpu=sm90") == []  # what quantkit writes


def test_exact_names_of_wrappers_are_translated_and_patterns_are_not():
    linears = [
        Linear("model.language_model.layers.0.mlp.down_proj", (1024, 2048), FOUR),
        Linear("model.visual.blocks.0.mlp.linear_fc1", (1024, 1024), None),
    ]
    config = {"model_type": "qwen3_vl"}
    assert rules(subject(linears, config), "vllm,gpu=sm90") == []
    assert rules(subject(linears, config, ["re:.*visual.*"]), "vllm,gpu=sm90") == []
    assert rules(subject(linears, config, ["re:model.visual.*"]), "vllm,gpu=sm90") == ["names"]


@pytest.mark.parametrize(
    ("model_type", "leaves", "wrong"),
    [
        ("qwen3_5_text", ("in_proj_qkv", "in_proj_z"), True),
        ("qwen3_5_text", ("in_proj_b", "in_proj_a"), True),
        ("deepseek_v3", ("q_a_proj", "kv_a_proj_with_mqa"), True),
        ("lfm2", ("w1", "w3"), True),
        ("mixtral", ("w1", "w3"), False),
        ("llama", ("up_proj", "down_proj"), False),
    ],
)
def test_which_linears_are_one_in_the_engine(model_type, leaves, wrong):
    first, second = (Linear(f"model.layers.0.mixer.{leaf}", (1024, 1024), FOUR) for leaf in leaves)
    both = subject([first, replace(second, scheme=Scheme(integer(8)))], {"model_type": model_type})
    assert rules(both, "vllm,gpu=sm90") == (["siblings"] if wrong else [])


def test_experts_of_a_layer_share_a_scheme():
    names = [f"model.layers.0.mlp.experts.{n}.up_proj" for n in range(2)]
    linears = [
        Linear(name, (1024, 1024), Scheme(integer(bits))) for name, bits in zip(names, (4, 8), strict=True)
    ]
    assert rules(subject(linears), "vllm,gpu=sm90") == ["siblings"]


@pytest.mark.parametrize(
    ("cache", "target", "fine"),
    [
        ("FP8_TENSOR", "vllm,gpu=cpu", True),
        ("FP8_TENSOR", "vllm,gpu=cpu-avx2", False),
        ("FP8", "vllm,gpu=sm90", True),
        ("FP8", "vllm,gpu=sm80", False),
        ("FP8", "vllm,gpu=cpu", False),
        ("INT8", "vllm,gpu=sm80", True),
        ("INT8", "vllm,gpu=cpu", False),
        ("INT4", "vllm,gpu=sm90", True),
        ("KIVI2", "vllm,gpu=sm90", False),
        ("FP8_TENSOR", "sglang,gpu=sm90", True),
        ("FP8", "sglang,gpu=sm90", False),
        ("INT8", "transformers", False),
        ("FP8", "transformers", True),
        ("KIVI2", "quantkit", True),
    ],
)
def test_which_cache_runs_where(cache, target, fine):
    checkpoint = subject(llama(PRESETS["W8A8"]).linears, kv=KV_PRESETS[cache])
    assert rules(checkpoint, target) == ([] if fine else ["cache"])


def test_mixed_bits_have_no_kernel_on_the_cpu():
    mixed = llama(changed={"down_proj": Scheme(integer(8))})
    (finding,) = preflight(mixed, Target("vllm", 1, "cpu"))
    assert "down_proj (1): W8A16 g128 sym has no kernel" in str(finding)
    assert preflight(mixed, Target("vllm", 1, "sm80")) == []


def test_transformers_and_quantkit_do_not_share_layers_out():
    assert (
        rules(llama(), "transformers,tensor_parallel=2")
        == rules(llama(), "quantkit,tensor_parallel=2")
        == ["split"]
    )
    several = llama(Scheme(integer(4, 128, False)), changed={"down_proj": Scheme(integer(8))})
    assert rules(several, "transformers") == ["schemes"]


def test_findings_gather_the_layers_with_the_same_words():
    found = preflight(llama(inner=640, blocks=3), Target("vllm", 2))
    assert [finding.layers for finding in found] == ["model.layers.*.mlp.down_proj (3)"]


def test_without_a_target_every_engine_says_what_it_refuses():
    lines = verdicts(llama(Scheme(integer(8, 128)), inner=640))
    assert lines[0] == (True, "vLLM on sm80, sm90, sm100; tensor_parallel 1")
    assert any(not runs and said.startswith("vLLM on cpu: ") for runs, said in lines)
    assert lines[-1] == (True, "quantkit")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vlm", "engine must be one of vllm, sglang, transformers, quantkit, got 'vlm'"),
        ("engine=vllm,tp=4", "unknown key 'tp'"),
        ("vllm,gpu=h100", "gpu must be one of sm75"),
        ("vllm,tensor_parallel=0", "a number from 1 to 1024, got '0'"),
        ("vllm,tensor_parallel=two", "got 'two'"),
        ("gpu=sm90", "got None"),
        ("vllm,engine=vllm", "given twice"),
    ],
)
def test_a_target_that_is_none(text, said):
    with pytest.raises(RecipeError) as caught:
        parse_target(text)
    assert said in str(caught.value)


def test_the_tables_name_what_exists():
    assert {kernel.engine for kernel in KERNELS} < set(ENGINES)
    assert all(kernel.file.endswith(".py") for kernel in KERNELS)
    assert all(fusion.file.endswith(".py") and len(fusion.parts) > 1 for fusion in FUSIONS)
    assert all(file.endswith(".py") for _, file in RENAMED.values())
    assert {"o_proj", "down_proj"} < ROW_PARALLEL


def test_the_room_imports_no_torch():
    code = (
        "import sys, quantkit.preflight.check, quantkit.recipe.recipe; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("leaves", "targets", "found"),
    [
        (("w1", "w2", "w3"), ["Linear"], []),
        (("w1", "w2", "w3"), [r"re:.*experts\.\d+\.w[123]$"], ["names"] * 3),
        (("gate_proj", "up_proj", "down_proj"), [r"re:.*experts\.\d+\.\w+_proj$"], []),
        (("w1", "w2", "w3"), [r"re:.*experts\.\d+\.(w[123]|\w+_proj)$"], []),
    ],
)
def test_experts_are_found_under_the_names_that_vllm_asks_for(leaves, targets, found):
    """However the disk calls them: a pattern of w1, w2 and w3 alone leaves them unquantized there."""
    linears = [
        Linear(f"model.layers.0.block_sparse_moe.experts.{e}.{leaf}", (512, 512), FOUR)
        for e in range(2)
        for leaf in leaves
    ]
    checkpoint = subject(linears, {"model_type": "mixtral"}, targets=targets)
    assert rules(checkpoint, "vllm,gpu=sm90") == found
    assert rules(checkpoint, "sglang,gpu=sm90") == []
