"""Write a random Llama of any depth, shard by shard, to measure memory and time without a download.

    python -m quantkit.bench.synthetic OUT --layers 24        # about 2.4 GB bf16: hidden 2048, intermediate 5504
    python -m quantkit.bench.synthetic OUT --layers 22 --shape 1.1b

The tokenizer is the embedded model's, and so is the vocabulary of the first shape. Weights are normal with the usual
0.02, seeded.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from quantkit import assets
from quantkit.checkpoint.shards import write_json, write_shard


class Shape(NamedTuple):
    """The sizes of a Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "memory": Shape(2048, 5504, 16, 16, 8192),
    "1.1b": Shape(2048, 5632, 32, 4, 32000),  # of the usual 1.1B Llama: 22 layers
}


def make(folder: Path, layers: int, seed: int = 0, shape: Shape = SHAPES["memory"]) -> Path:
    """Write the checkpoint: one shard per block and one for the rest."""
    hidden, intermediate = shape.hidden, shape.intermediate
    outputs = {"q": hidden, "k": shape.kv_heads * shape.head_dim, "v": shape.kv_heads * shape.head_dim}
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    weight_map: dict[str, str] = {}
    total = 0

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        written = write_shard(folder / file, tensors)
        weight_map.update(dict.fromkeys(written.tensors, file))
        total += sum(written.tensors.values())

    for i in range(layers):
        at = f"model.layers.{i}"
        write(
            i + 1,
            {f"{at}.self_attn.{p}_proj.weight": normal(outputs.get(p, hidden), hidden) for p in "qkvo"}
            | {f"{at}.mlp.{p}_proj.weight": normal(intermediate, hidden) for p in ("gate", "up")}
            | {f"{at}.mlp.down_proj.weight": normal(hidden, intermediate)}
            | {
                f"{at}.{n}.weight": torch.ones(hidden, dtype=torch.bfloat16)
                for n in ("input_layernorm", "post_attention_layernorm")
            },
        )
    write(
        layers + 1,
        {
            "model.embed_tokens.weight": normal(shape.vocabulary, hidden),
            "lm_head.weight": normal(shape.vocabulary, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        },
    )
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    config = json.loads((assets.default_model() / "config.json").read_text())
    config |= {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
    }
    write_json(folder / "config.json", config)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(assets.default_model() / name, folder / name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shape", choices=SHAPES, default="memory")
    arguments = parser.parse_args()
    print(make(arguments.out, arguments.layers, shape=SHAPES[arguments.shape]))


if __name__ == "__main__":
    main()
