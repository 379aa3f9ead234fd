"""Checkpoints of published models without their weights: config.json, headers, and files as long as they would be."""

import json
import math

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LLAMA_3_8B = LLAMA_2_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MISTRAL_7B = LLAMA_3_8B | {"model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768}
QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


def shapes(config):
    """Tensor name -> shape, for a Llama, a Mistral or a Qwen3 mixture."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim", hidden // heads)
    rows = {
        "q": heads * size,
        "k": config["num_key_value_heads"] * size,
        "v": config["num_key_value_heads"] * size,
    }
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for number in range(config["num_hidden_layers"]):
        at = f"model.layers.{number}"
        found |= {f"{at}.self_attn.{p}_proj.weight": (n, hidden) for p, n in rows.items()}
        found[f"{at}.self_attn.o_proj.weight"] = (hidden, rows["q"])
        if experts := config.get("num_experts", 0):
            found[f"{at}.mlp.gate.weight"] = (experts, hidden)
            found |= {f"{at}.self_attn.{p}_norm.weight": (size,) for p in "qk"}
        wide = config["moe_intermediate_size" if experts else "intermediate_size"]
        for inside in [f"mlp.experts.{e}" for e in range(experts)] or ["mlp"]:
            found |= {f"{at}.{inside}.{p}_proj.weight": (wide, hidden) for p in ("gate", "up")}
            found[f"{at}.{inside}.down_proj.weight"] = (hidden, wide)
        found |= {f"{at}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def write(folder, config, shard=10_000_000_000):
    """A folder with config.json and sparse safetensors files in bf16; the number of weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    files, filled = [{}], 0
    for name, shape in shapes(config).items():
        n_bytes = 2 * math.prod(shape)
        if filled + n_bytes > shard:
            files, filled = [*files, {}], 0
        files[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [filled, filled + n_bytes]}
        filled += n_bytes
    index = {}
    for number, entries in enumerate(files):
        header = json.dumps(entries).encode()
        file = folder / f"model-{number:05}.safetensors"
        with file.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + max(e["data_offsets"][1] for e in entries.values()))
        index |= dict.fromkeys(entries, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(math.prod(shape) for shape in shapes(config).values())
