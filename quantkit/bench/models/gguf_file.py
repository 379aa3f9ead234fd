"""Write a Llama or Qwen3-MoE checkpoint (safetensors, bf16) as one GGUF file, for quantkit.bench.models.llamacpp.

    python gguf_file.py CHECKPOINT OUT.gguf [TYPE]

TYPE: "BF16", the default, or "Q4_0" or "Q8_0", rounded by the gguf package as llama.cpp's quantizer does.

Runs in llama.cpp's environment and imports the standard library, numpy and gguf, nothing of quantkit. The file has no
tokenizer; llama-bench invents its tokens.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, bf16 bits as uint16) of every tensor, memory-mapped."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{file}: {name} is {entry['dtype']}; only bf16 checkpoints are written")
            yield (
                name,
                np.memmap(file, np.uint16, "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"])),
            )


def rename(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    number, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[part]}.weight"


def pairs_together(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * d, K] of q or k: transformers rotates rows i and i + d/2 together, llama.cpp 2i and 2i + 1."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def stacked(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """`tensors` by llama.cpp's names, the experts of a role of a layer as one [E, N, K]."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, bits in tensors(checkpoint):
        if match := EXPERT.fullmatch(name):
            parts.setdefault(f"blk.{match[1]}.ffn_{match[3]}_exps.weight", {})[int(match[2])] = bits
        else:
            yield rename(name), bits
    for name, experts in parts.items():
        yield name, np.stack([experts[e] for e in range(len(experts))])


def write(checkpoint: Path, out: Path, kind: str = "BF16") -> None:
    """Write the file: matrices as `kind`, norms and routers as fp32."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    experts = config.get("num_experts", 0)
    writer = gguf.GGUFWriter(out, "qwen3moe" if experts else "llama")
    _describe(writer, config, getattr(gguf.LlamaFileType, f"MOSTLY_{kind}"))
    wanted = getattr(gguf.GGMLQuantizationType, kind)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, bits in stacked(checkpoint):
        role = name.split(".")[-2]
        if bits.ndim == 1 or role == "ffn_gate_inp":
            writer.add_tensor(name, _floats(bits))
            continue
        if role in heads and not experts:
            bits = pairs_together(bits, heads[role])
        if kind == "BF16":
            data = np.ascontiguousarray(bits).view(np.uint8)
        else:
            data = gguf.quants.quantize(_floats(bits), wanted)
        writer.add_tensor(name, data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _floats(bits: np.ndarray) -> np.ndarray:
    floats: np.ndarray = (bits.astype(np.uint32) << 16).view(np.float32)
    return floats


def _describe(writer: Any, config: dict[str, Any], file_type: Any) -> None:
    """The sizes of the model."""
    writer.add_file_type(file_type)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_experts" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_tokenizer_model("none")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
