"""Write a Llama checkpoint (safetensors, bf16) as one dense GGUF file, for quantkit.bench.models.llamacpp.

    python gguf_file.py CHECKPOINT OUT.gguf

Runs in llama.cpp's environment and imports the standard library, numpy and gguf, nothing of quantkit. The file has no
tokenizer; llama-bench invents its tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

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
}
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


def write(checkpoint: Path, out: Path) -> None:
    """Write the file: matrices as bf16, norms as fp32."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("none")
    for name, bits in tensors(checkpoint):
        if bits.ndim == 1:
            writer.add_tensor(rename(name), (bits.astype(np.uint32) << 16).view(np.float32))
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            bits = pairs_together(bits, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(
            rename(name), np.ascontiguousarray(bits).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
