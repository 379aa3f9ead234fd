"""Facts about engines, as data, each with the file it was read in: kernels, fused linears, how layers are split.

Read: vLLM 0.32.0 (paths below vllm/) and SGLang's repository as stored in 2026 (paths below sglang/srt/). What was also
run, and where, is in docs/interoperability.md. A new kernel or another version is a row, not code.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.preflight.target import Device

VERSIONS = {"vllm": "vLLM 0.32.0", "sglang": "SGLang 2026", "transformers": "transformers 5.23"}
_LINEAR = "model_executor/kernels/linear"
_MIXED = f"{_LINEAR}/mixed_precision"
_SCALED = f"{_LINEAR}/scaled_mm"
_CT = "model_executor/layers/quantization/compressed_tensors"
_ALL = tuple(range(2, 9))
_SGLANG_CT = "layers/quantization/compressed_tensors"


def source(engine: str, file: str) -> str:
    return f"{VERSIONS[engine]}, {file}"


@dataclass(frozen=True)
class Kernel:
    """A kernel of an engine, and what it takes.

    family: of schemes, see `family_of`. least, most: CUDA capabilities; least None: it runs on CPUs with the
    instruction sets `features`. symmetric, asymmetric: bits of integer weights, empty for families without integers.
    groups: group sizes, None is a channel; groups None: any, or with `even` any even one. rows, columns: what N and K
    of a shard are multiples of. needs: an optional package.
    """

    engine: str
    name: str
    family: str
    file: str
    least: int | None = 75
    most: int = 999
    features: frozenset[str] = frozenset()
    symmetric: tuple[int, ...] = ()
    asymmetric: tuple[int, ...] = ()
    groups: tuple[int | None, ...] | None = None
    rows: int = 1
    columns: int = 1
    even: bool = False
    needs: str | None = None

    def runs_on(self, device: Device) -> bool:
        if self.least is None or device.capability is None:
            return (self.least is None) == (device.capability is None) and self.features <= device.features
        return self.least <= device.capability <= self.most

    def takes(self, bits: int, symmetric: bool, group: int | None) -> bool:
        """Whether it takes weights of these bits, by this group size (None: a channel)."""
        known = self.symmetric if symmetric else self.asymmetric
        if (self.symmetric or self.asymmetric) and bits not in known:
            return False
        return (self.groups is None or group in self.groups) and not (self.even and group and group % 2)

    def fits(self, n: int, k: int) -> bool:
        """Whether a shard [n, k] of a weight is whole tiles."""
        return n % self.rows == 0 and k % self.columns == 0


_AVX512, _AMX = frozenset({"avx512"}), frozenset({"avx512", "amx"})
_MARLIN_GROUPS = (None, 32, 64, 128)

# In vLLM's order of preference. WNA16's capability is 75 (schemes/compressed_tensors_wNa16.py).
KERNELS: tuple[Kernel, ...] = (
    Kernel(
        *("vllm", "Machete", "integers", f"{_MIXED}/machete.py", 90, 90),
        symmetric=(4, 8),
        asymmetric=(4, 8),
        groups=(None, 64, 128),
        rows=128,
        columns=64,
    ),
    Kernel(
        *("vllm", "Marlin", "integers", f"{_MIXED}/marlin.py"),
        symmetric=(4, 8),
        asymmetric=(4,),
        groups=_MARLIN_GROUPS,
    ),
    Kernel(
        *("vllm", "Triton W4A16", "integers", f"{_MIXED}/triton_w4a16.py"),
        symmetric=(4,),
        asymmetric=(4,),
        groups=(None, 32, 64, 128, 256),
        rows=8,
    ),
    Kernel(
        *("vllm", "Humming", "integers", f"{_MIXED}/humming.py"),
        symmetric=_ALL,
        asymmetric=_ALL,
        needs="the package humming",
    ),
    # The operation cpu_gemm_wna16 is in the libraries for AVX-512 alone (platforms/cpu.py chooses the library).
    Kernel(
        *("vllm", "CPU WNA16", "integers", f"{_MIXED}/cpu.py", None),
        features=_AVX512,
        symmetric=(4,),
        asymmetric=(4,),
        rows=32,
        columns=32,
        even=True,
    ),
    Kernel("vllm", "int8", "int8 inputs", f"{_SCALED}/cutlass.py"),
    Kernel("vllm", "CPU int8", "int8 inputs", f"{_SCALED}/cpu.py", None),
    Kernel("vllm", "CPU dynamic 4-bit", "int4, int8 inputs", f"{_MIXED}/dynamic_4bit.py", None),
    Kernel("vllm", "FP8", "fp8 token", f"{_SCALED}/cutlass.py", 89),
    Kernel(
        "vllm",
        "Marlin FP8, inputs left as they are",
        "fp8 token",
        f"{_CT}/schemes/compressed_tensors_w8a16_fp8.py",
    ),
    Kernel("vllm", "torch FP8", "fp8 token", f"{_SCALED}/pytorch.py", None),
    Kernel("vllm", "FP8", "fp8 tensor", f"{_SCALED}/cutlass.py", 89),
    Kernel(
        "vllm",
        "Marlin FP8, inputs left as they are",
        "fp8 tensor",
        f"{_CT}/schemes/compressed_tensors_w8a16_fp8.py",
    ),
    # Without AMX the torch kernel is chosen, whose operation static_scaled_fp8_quant no CPU library has.
    Kernel("vllm", "CPU FP8", "fp8 tensor", f"{_SCALED}/cpu.py", None, features=_AMX, rows=32),
    Kernel("vllm", "FP8 blocks", "fp8 block", f"{_SCALED}/cutlass.py"),
    Kernel("vllm", "CPU FP8 blocks", "fp8 block", f"{_SCALED}/cpu.py", None, features=_AMX),
    Kernel("vllm", "Marlin FP8", "fp8 weights", f"{_SCALED}/marlin.py"),
    Kernel("vllm", "Marlin NVFP4", "nvfp4", f"{_LINEAR}/nvfp4/marlin.py"),
    Kernel("vllm", "Marlin MXFP4", "mxfp4", f"{_LINEAR}/mxfp4/marlin.py", 80),
    Kernel("vllm", "Marlin MXFP8", "mxfp8", f"{_LINEAR}/mxfp8/marlin.py"),
    # Without kernels for the inputs of a GPU, vLLM takes the same kernels and leaves inputs as they are.
    Kernel("vllm", "NVFP4", "nvfp4 inputs", f"{_LINEAR}/nvfp4/cutlass.py", 100),
    Kernel("vllm", "Marlin NVFP4, inputs left as they are", "nvfp4 inputs", f"{_LINEAR}/nvfp4/marlin.py"),
    Kernel("vllm", "Marlin MXFP4, inputs left as they are", "mxfp4 inputs", f"{_LINEAR}/mxfp4/marlin.py", 80),
    Kernel("vllm", "Marlin MXFP8, inputs left as they are", "mxfp8 inputs", f"{_LINEAR}/mxfp8/marlin.py"),
    Kernel(
        *("sglang", "Marlin", "integers", f"{_SGLANG_CT}/schemes/compressed_tensors_wNa16.py", 80),
        symmetric=(4, 8),
        asymmetric=(4,),
        groups=_MARLIN_GROUPS,
        rows=64,
        columns=128,
    ),
    Kernel(
        *("sglang", "CPU W4A16", "integers", f"{_SGLANG_CT}/schemes/compressed_tensors_wNa16.py", None),
        features=_AMX,
        symmetric=(),
        asymmetric=(4,),
        groups=_MARLIN_GROUPS,
    ),
    Kernel("sglang", "int8", "int8 inputs", f"{_SGLANG_CT}/schemes/compressed_tensors_w8a8_int8.py"),
    Kernel("sglang", "FP8", "fp8 token", f"{_SGLANG_CT}/schemes/compressed_tensors_w8a8_fp8.py", 89),
    Kernel("sglang", "FP8", "fp8 tensor", f"{_SGLANG_CT}/schemes/compressed_tensors_w8a8_fp8.py", 89),
    Kernel("sglang", "FP8 blocks", "fp8 block", f"{_SGLANG_CT}/schemes/compressed_tensors_w8a8_fp8.py", 89),
    Kernel(
        "sglang", "Marlin FP8", "fp8 weights", f"{_SGLANG_CT}/schemes/compressed_tensors_w8a16_fp8.py", 80
    ),
    Kernel("sglang", "NVFP4 weights", "nvfp4", f"{_SGLANG_CT}/schemes/compressed_tensors_w4a16_nvfp4.py", 80),
    Kernel("sglang", "NVFP4", "nvfp4 inputs", f"{_SGLANG_CT}/schemes/compressed_tensors_w4a4_nvfp4.py", 100),
    Kernel("sglang", "MXFP4 weights", "mxfp4", f"{_SGLANG_CT}/schemes/compressed_tensors_w4a16_mxfp4.py", 80),
)


@dataclass(frozen=True)
class Reading:
    """How an engine reads the files of another tool. No row: it has no reader of them.

    kinds: (bits, symmetric) of integer weights on GPUs; cpu: on CPUs. groups: group sizes, None is a channel; None for
    all: what its kernels take. own: kernels for these files alone, which run what the others do not take and the kinds
    `alone`; with `anyhow` also what is not whole tiles for the others. ordered: on GPUs it takes groups of columns in
    the order of GPTQ's desc_act. keys: of `quantization_config` that it does not do without, each with its spellings.
    needs: optional packages.
    """

    file: str
    kinds: frozenset[tuple[int, bool]] = frozenset()
    cpu: frozenset[tuple[int, bool]] = frozenset()
    groups: tuple[int | None, ...] | None = None
    own: tuple[Kernel, ...] = ()
    alone: frozenset[tuple[int, bool]] = frozenset()
    anyhow: bool = False
    ordered: bool = True
    keys: tuple[tuple[str, ...], ...] = ()
    needs: str | None = None


def _kinds(symmetric: tuple[int, ...], asymmetric: tuple[int, ...] = ()) -> frozenset[tuple[int, bool]]:
    return frozenset({*((bits, True) for bits in symmetric), *((bits, False) for bits in asymmetric)})


_Q, _GPTQ_BITS = "model_executor/layers/quantization", (2, 3, 4, 8)
_SIZES = (("bits",), ("group_size",), ("desc_act",))
_AWQ_KEYS = (("w_bit", "bits"), ("q_group_size", "group_size"), ("zero_point",))
_SGLANG_GPTQ = "layers/quantization/gptq/gptq.py"
_EXLLAMA = Kernel(*("sglang", "GPTQ", "integers", _SGLANG_GPTQ), symmetric=_GPTQ_BITS, asymmetric=_GPTQ_BITS)
_GPTQ_AMX = Kernel(
    *("sglang", "CPU GPTQ", "integers", "layers/quantization/gptq/schemes/gptq_cpu.py", None),
    features=_AMX,
    symmetric=(4,),
    asymmetric=(4,),
)
# Where an engine lists the formats that it reads.
READERS = {
    "vllm": f"{_Q}/__init__.py",
    "sglang": "layers/quantization/__init__.py",
    "transformers": "quantizers/auto.py",
}
# engine -> format -> how it reads it. "auto-round awq" are AutoRound's files with AWQ's tensors.
READINGS: dict[str, dict[str, Reading]] = {
    "vllm": {
        "gptq": Reading(
            f"{_Q}/auto_gptq.py",
            kinds=_kinds((4, 8)),
            cpu=_kinds((4,)),
            groups=_MARLIN_GROUPS,
            ordered=False,
            keys=(*_SIZES, ("sym",)),
        ),
        "awq": Reading(
            f"{_Q}/auto_awq.py",
            kinds=_kinds((), (4,)),
            cpu=_kinds((), (4,)),
            own=(Kernel("vllm", "AWQ", "integers", f"{_Q}/auto_awq.py", asymmetric=(4,)),),
            anyhow=True,
            keys=_AWQ_KEYS,
        ),
        "auto-round": Reading(
            f"{_Q}/inc/schemes/inc_wna16_scheme.py",
            kinds=_kinds(_ALL, (2, 3, 5, 6, 7)),
            cpu=_kinds((4,)),
            keys=(("bits",), ("group_size",)),
        ),
        "auto-round awq": Reading(
            f"{_Q}/inc/schemes/inc_wna16_scheme.py",
            kinds=_kinds((), (2, 3, 4, 5, 6, 7)),
            cpu=_kinds((), (4,)),
            keys=(("bits",), ("group_size",)),
        ),
        "fp8": Reading(f"{_Q}/fp8.py"),
        "modelopt": Reading(f"{_Q}/modelopt.py"),
        "mxfp4": Reading(f"{_Q}/mxfp4.py"),
    },
    "sglang": {
        "gptq": Reading(
            _SGLANG_GPTQ,
            kinds=_kinds(_GPTQ_BITS, _GPTQ_BITS),
            cpu=_kinds((4,), (4,)),
            own=(_EXLLAMA, _GPTQ_AMX),
            alone=_kinds((), _GPTQ_BITS),
            keys=_SIZES,
        ),
        "awq": Reading(
            "layers/quantization/awq/awq.py",
            kinds=_kinds((), (4,)),
            cpu=_kinds((), (4,)),
            own=(Kernel("sglang", "AWQ", "integers", "layers/quantization/awq/awq.py", asymmetric=(4,)),),
            anyhow=True,
            keys=_AWQ_KEYS,
        ),
        "auto-round": Reading(
            "layers/quantization/auto_round.py",
            kinds=_kinds(_GPTQ_BITS, _GPTQ_BITS),
            own=(_EXLLAMA,),
            alone=_kinds((), _GPTQ_BITS),
            keys=(("bits",), ("group_size",), ("sym",)),
        ),
        "auto-round awq": Reading(
            "layers/quantization/auto_round.py",
            kinds=_kinds((), (4,)),
            own=(Kernel("sglang", "AWQ", "integers", "layers/quantization/awq/awq.py", asymmetric=(4,)),),
            keys=(("bits",), ("group_size",), ("sym",)),
        ),
        "bitsandbytes": Reading(
            "layers/quantization/bitsandbytes.py",
            kinds=_kinds((8,)),
            own=(Kernel("sglang", "bitsandbytes", "tables", "layers/quantization/bitsandbytes.py"),),
        ),
        "fp8": Reading("layers/quantization/fp8.py"),
        "modelopt": Reading("layers/quantization/modelopt_quant.py"),
        "mxfp4": Reading("layers/quantization/mxfp4.py"),
    },
    "transformers": {
        "gptq": Reading("quantizers/quantizer_gptq.py", needs="the packages optimum and gptqmodel"),
        "awq": Reading("quantizers/quantizer_awq.py", needs="the package gptqmodel"),
        "auto-round": Reading("quantizers/quantizer_auto_round.py", needs="the package auto-round"),
        "auto-round awq": Reading("quantizers/quantizer_auto_round.py", needs="the package auto-round"),
        "bitsandbytes": Reading("quantizers/quantizer_bnb_4bit.py", needs="the package bitsandbytes"),
        "fp8": Reading("quantizers/quantizer_finegrained_fp8.py"),
        "mxfp4": Reading("quantizers/quantizer_mxfp4.py"),
    },
}


@dataclass(frozen=True)
class Fusion:
    """Linears that engines hold as one, by the last part of their names; they need one scheme.

    types: the model types it is limited to, empty: all. split: whether tensor parallelism splits it.
    """

    fused: str
    parts: tuple[str, ...]
    file: str
    types: frozenset[str] = frozenset()
    split: bool = True


_QWEN35 = frozenset({"qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"})
# `packed_modules_mapping` of vLLM's model classes; SGLang has the same in its own files.
FUSIONS: tuple[Fusion, ...] = (
    Fusion("qkv_proj", ("q_proj", "k_proj", "v_proj"), "model_executor/models/llama.py"),
    Fusion("gate_up_proj", ("gate_proj", "up_proj"), "model_executor/models/llama.py"),
    Fusion("in_proj_qkvz", ("in_proj_qkv", "in_proj_z"), "model_executor/models/qwen3_5.py", _QWEN35),
    Fusion("in_proj_ba", ("in_proj_b", "in_proj_a"), "model_executor/models/qwen3_5.py", _QWEN35),
    Fusion(
        "fused_qkv_a_proj",
        ("q_a_proj", "kv_a_proj_with_mqa"),
        "model_executor/models/deepseek_v2.py",
        split=False,
    ),
    Fusion("w13", ("w1", "w3"), "model_executor/models/lfm2.py", frozenset({"lfm2", "lfm2_moe"})),
    Fusion("gate_up_proj", ("w1", "w3"), "model_executor/models/internlm2.py", frozenset({"internlm2"})),
    Fusion("gate_up_proj", ("c_fc_0", "c_fc_1"), "model_executor/models/exaone.py", frozenset({"exaone"})),
    Fusion(
        "in_proj_qkvg",
        ("q_proj", "k_proj", "v_proj", "g_proj"),
        "model_executor/models/olmo_hybrid.py",
        frozenset({"olmo_hybrid"}),
    ),
)

# Types of models whose experts transformers holds in one tensor per layer and does not gather from linears of each
# expert (its conversion_mapping.py), and those for which its quantizers make linears of them (quantizers/base.py).
STACKED = frozenset(
    {"aria", "aria_text", "dbrx", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "gpt_oss"}
    | {"granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hy_v4", "inkling_mm_model"}
    | {"jetmoe", "inkling_text", "inkling2", "inkling2_text", "mistral4", "muse_spark", "muse_spark_text"}
    | {"qwen3_vl_moe", "qwen3_vl_moe_text", "step3p7", "zaya"}
)
UNROLLED = frozenset({"llama4", "llama4_text"})

# Last parts of names of linears whose columns tensor parallelism splits; of others it splits the rows.
ROW_PARALLEL = frozenset(
    {"o_proj", "out_proj", "down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out"}
    | {"w2", "wo", "dense", "x_proj", "linear_out"}
)
REPLICATED = frozenset(
    ["q_a_proj", "kv_a_proj_with_mqa", "gate", "router", "shared_expert_gate", "in_proj_ba"]
)
KEY_VALUES = frozenset({"k_proj", "v_proj"})

# Wrappers whose modules vLLM calls otherwise than the file: (prefix on disk, prefix in vLLM), the first that fits.
# Exact names in `ignore` and `targets` are translated, patterns ("re:") are not.
_WRAPPED = (
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head", "language_model.lm_head"),
)
RENAMED: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "qwen2_5_vl": ((*_WRAPPED, ("model.", "language_model.model.")), "model_executor/models/qwen2_5_vl.py"),
    "qwen2_vl": ((*_WRAPPED, ("model.", "language_model.model.")), "model_executor/models/qwen2_vl.py"),
    "qwen3_vl": (_WRAPPED, "model_executor/models/qwen3_vl.py"),
    "qwen3_5": (_WRAPPED, "model_executor/models/qwen3_5.py"),
    "gemma3": (_WRAPPED, "model_executor/models/gemma3_mm.py"),
    "llava": (_WRAPPED, "model_executor/models/llava.py"),
    "mistral3": ((*_WRAPPED, ("model.", "language_model.model.")), "model_executor/models/mistral3.py"),
}
