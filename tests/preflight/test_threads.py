"""What failed at serve time in public issue threads is refused here before anything is computed, with its remedy."""

import pytest
from engine_subjects import FOUR, PRESETS, llama, subject

from quantkit.preflight.check import preflight
from quantkit.preflight.subject import Linear
from quantkit.preflight.target import parse_target
from quantkit.scheme import NUMBERS, Grid, KVScheme, Scheme, integer

BLOCKS = PRESETS["FP8_BLOCK"]
EIGHT = PRESETS["W8A8"]
STORED_INT8 = KVScheme(*[Grid(NUMBERS["int8"], "tensor")] * 2)


def one(name, shape, scheme=FOUR, kind="compressed-tensors", **config):
    return subject(
        [Linear(name, shape, scheme, kind)], {"model_type": "llama", "num_hidden_layers": 60} | config
    )


def experts(inner, scheme):
    shapes = {"gate_proj": (inner, 2048), "up_proj": (inner, 2048), "down_proj": (2048, inner)}
    return subject(
        [Linear(f"model.layers.0.mlp.experts.0.{n}", shape, scheme) for n, shape in shapes.items()]
    )


def mtp(*dense, ignore):
    linears = [
        Linear("model.layers.0.mlp.down_proj", (2048, 512), FOUR),
        *(Linear(n, (64, 64), None) for n in dense),
    ]
    return subject(linears, {"model_type": "qwen3_5", "mtp_num_hidden_layers": 1}, ignore)


def cached(kv):
    return subject(llama().linears, kv=kv)


def heads(number):
    return llama(config={"num_attention_heads": number})


def tied():
    head = Linear("lm_head", (512, 1024), Scheme(integer(4, 128)))
    linears = [*llama().linears, head]
    return subject(
        linears, {"model_type": "qwen3", "tie_word_embeddings": True}, targets=["Linear", "lm_head"]
    )


def wrapped():
    linears = [
        Linear("model.language_model.layers.0.mlp.down_proj", (1024, 2048), FOUR),
        Linear("model.visual.blocks.0.mlp.linear_fc1", (1024, 1024), None),
    ]
    return subject(linears, {"model_type": "qwen3_vl"}, ignore=[r"re:model\.visual\..*"])


# thread, checkpoint, target, what the message must say: layer, numbers, remedy
THREADS = [
    # The input of a row-parallel layer, 640, is shared by two devices: 320 columns, groups of 128.
    (
        "vllm#57792",
        llama(inner=640),
        "vllm,tensor_parallel=2",
        ["down_proj", "640 / tensor_parallel 2 = 320", "64"],
    ),
    # Qwen1.5-14B-Chat as GPTQ and AWQ on two GPUs: 13696 / 2 = 6848.
    (
        "vllm#2699",
        one("model.layers.0.mlp.down_proj", (5120, 13696), Scheme(integer(4, 128, False)), "awq"),
        "vllm,tensor_parallel=2",
        ["13696 / tensor_parallel 2 = 6848", "groups of 128", "tensor_parallel: 1"],
    ),
    # Qwen2.5-VL-72B-Instruct-AWQ on four GPUs.
    (
        "Qwen3-VL#831",
        one("model.layers.0.mlp.down_proj", (8192, 29568), Scheme(integer(4, 128, False)), "awq"),
        "vllm,tensor_parallel=4",
        ["29568 / tensor_parallel 4 = 7392", "groups of 128"],
    ),
    # Qwen2-72B W4A16 on two A100: 14784 columns a device.
    (
        "llm-compressor#973",
        one("model.layers.0.mlp.down_proj", (8192, 29568)),
        "vllm,tensor_parallel=2,gpu=sm80",
        ["29568 / tensor_parallel 2 = 14784", "group_size 64, 32, channel"],
    ),
    # 4304 columns in groups of 32.
    (
        "vllm-omni#3714",
        one("visual.blocks.0.mlp.linear_fc2", (1152, 4304), Scheme(integer(4, 32))),
        "vllm,gpu=sm90",
        ["4304 is not whole groups of 32", "channel"],
    ),
    # Groups of 512 over the 768 columns of an expert.
    (
        "compressed-tensors#447",
        one("model.layers.0.mlp.experts.0.down_proj", (2048, 768), Scheme(integer(4, 512))),
        "vllm",
        ["768 is not whole groups of 512"],
    ),
    # DeepSeek-V3, blocks of 128 x 128, over 32 devices: 18432 / 32 = 576 rows.
    (
        "vllm#12256",
        one("model.layers.0.mlp.gate_proj", (18432, 7168), BLOCKS),
        "vllm,tensor_parallel=32",
        ["576 rows of one of 32 devices are not whole blocks of 128", "FP8_DYNAMIC"],
    ),
    # The same in SGLang.
    (
        "sglang#3345",
        one("model.layers.0.mlp.up_proj", (18432, 7168), BLOCKS),
        "sglang,tensor_parallel=32",
        ["576 rows", "blocks of 128"],
    ),
    # A shared expert's input of 3072 over 16 devices.
    (
        "vllm#42384",
        one("model.layers.0.mlp.shared_experts.down_proj", (7168, 3072), BLOCKS),
        "vllm,tensor_parallel=16",
        ["192 columns of one of 16 devices are not whole blocks of 128"],
    ),
    # A shared expert of 1280 rows over 4 devices.
    (
        "sglang#26107",
        one("model.layers.3.share_expert.gate_proj", (1280, 4096), BLOCKS),
        "sglang,tensor_parallel=4",
        ["320 rows", "fewer devices"],
    ),
    # Experts of 320 rows over 8 devices.
    (
        "vllm#54178",
        experts(320, BLOCKS),
        "vllm,tensor_parallel=8,gpu=sm89",
        ["gate_proj", "40 rows", "down_proj"],
    ),
    # A device's part is smaller than one block.
    (
        "vllm#52997",
        one("model.layers.0.self_attn.q_proj", (256, 1024), BLOCKS),
        "vllm,tensor_parallel=4",
        ["64 rows of one of 4 devices"],
    ),
    (
        "vllm#596",
        llama(config={"num_attention_heads": 40}),
        "vllm,tensor_parallel=3",
        ["40 attention heads", "tensor_parallel: 1, 2"],
    ),
    (
        "vllm#414",
        llama(config={"num_attention_heads": 52}),
        "vllm,tensor_parallel=3",
        ["52 attention heads", "tensor_parallel: 1, 2"],
    ),
    # The operation for 4-bit weights is compiled for AVX-512 only.
    ("vllm#55613", llama(), "vllm,gpu=cpu-avx2", ["W4A16 g128 sym has no kernel", "gpu: ", "cpu"]),
    # W8A16 weights on the CPU.
    (
        "vllm#12268",
        llama(Scheme(integer(8, 128))),
        "vllm,gpu=cpu",
        ["W8A16 g128 sym has no kernel", "bits: 4"],
    ),
    # 3 bits: on CUDA through Humming only.
    ("llm-compressor#3102", llama(Scheme(integer(3))), "vllm,gpu=cpu", ["W3A16 g128 sym", "bits: 4", "sm80"]),
    # Scales of an int8 cache in the checkpoint.
    ("vllm#33480", cached(STORED_INT8), "vllm,gpu=sm80", ["KV int8 tensor", "kv_cache: FP8"]),
    # The drafter's fc is dense, and the target Linear takes it for packed.
    (
        "vllm#53387",
        mtp("mtp.fc", ignore=[]),
        "vllm,gpu=sm90",
        ["mtp.fc", "is not quantized", "add it to `ignore`"],
    ),
    # Experts of the drafter are missing in ignore.
    (
        "vllm#41994",
        mtp("mtp.fc", "mtp.layers.0.mlp.experts.0.up_proj", ignore=["mtp.fc"]),
        "vllm,gpu=sm90",
        ["mtp.layers.*.mlp.experts.*.up_proj", "add it to `ignore`"],
    ),
    # The layer that predicts further tokens was left out of the files.
    (
        "vllm#35548",
        llama(config={"num_nextn_predict_layers": 1}),
        "vllm,gpu=sm100",
        ["config.json counts 1 layers", "no tensor of them", "set the count in config.json to 0"],
    ),
    # q, k and v are one layer in the engine: v has another scheme, or none.
    (
        "vllm#31623",
        llama(changed={"v_proj": Scheme(integer(8))}),
        "vllm,gpu=sm90",
        ["self_attn (1)", "v_proj W8A16 g128 sym", "one qkv_proj", "let the rules cover all of them"],
    ),
    (
        "vllm#11790",
        llama(EIGHT, changed={"q_proj": None}),
        "vllm,gpu=sm90",
        ["q_proj not quantized", "k_proj W8A8", "one qkv_proj"],
    ),
    ("vllm#45535", tied(), "vllm,gpu=sm90", ["lm_head", "tie_word_embeddings", "skip it"]),
    # `ignore` fits the names of the file, not those that the engine has after its renaming.
    ("vllm#51910", wrapped(), "vllm,gpu=sm90", ["model.visual.blocks.*.mlp.linear_fc1", "re:.*"]),
]


@pytest.mark.parametrize(
    ("thread", "checkpoint", "target", "said"), THREADS, ids=[each[0] for each in THREADS]
)
def test_what_failed_at_serve_time_is_refused(thread, checkpoint, target, said):
    found = "\n".join(map(str, preflight(checkpoint, parse_target(target))))
    assert found
    for part in said:
        assert part in found
    assert "; " in found  # the remedy
