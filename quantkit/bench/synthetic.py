"""A random Llama of any depth, written shard by shard, for measuring memory and time on sizes nobody wants to download.

    python -m quantkit.bench.synthetic OUT --layers 24        # about 2.4 GB bf16: hidden 2048, intermediate 5504

The tokenizer and vocabulary are the embedded model's. Weights are normal with the usual 0.02, seeded.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from quantkit import assets
from quantkit.checkpoint.shards import write_json, write_shard

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 2048, 5504, 16, 8192


def make(folder: Path, layers: int, seed: int = 0) -> Path:
    """Write the checkpoint: one shard per block and one for the rest."""
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
            {f"{at}.self_attn.{p}_proj.weight": normal(HIDDEN, HIDDEN) for p in "qkvo"}
            | {f"{at}.mlp.{p}_proj.weight": normal(INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
            | {f"{at}.mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE)}
            | {
                f"{at}.{n}.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)
                for n in ("input_layernorm", "post_attention_layernorm")
            },
        )
    write(
        layers + 1,
        {
            "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN),
            "lm_head.weight": normal(VOCABULARY, HIDDEN),
            "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        },
    )
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    config = json.loads((assets.default_model() / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
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
    arguments = parser.parse_args()
    print(make(arguments.out, arguments.layers))


if __name__ == "__main__":
    main()
