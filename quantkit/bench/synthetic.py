"""Write a random model of any depth, shard by shard, to measure memory and time without a download.

    python -m quantkit.bench.synthetic OUT --layers 24        # about 2.4 GB bf16: hidden 2048, intermediate 5504
    python -m quantkit.bench.synthetic OUT --layers 22 --shape 1.1b
    python -m quantkit.bench.synthetic OUT --layers 8 --shape moe         # about 2.5 GB bf16: 64 experts of 1024 x 768
    python -m quantkit.bench.synthetic OUT --layers 2 --shape moe-small --experts 128

Dense models are Llamas, mixtures are of the Qwen3-MoE type, with one tensor per expert. A mixture is made and written
one tensor after the other. The tokenizer is the embedded model's, and so is the vocabulary of all shapes but 1.1b.
Weights are normal with the usual 0.02, seeded.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantkit import assets
from quantkit.checkpoint.shards import Entry, Streamed, shard_name, write_shard
from quantkit.files import write_json


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


class Mixture(NamedTuple):
    """The sizes of a mixture; intermediate: of one expert; top: experts per token."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: int
    top: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "memory": Shape(2048, 5504, 16, 16, 8192),
    "1.1b": Shape(2048, 5632, 32, 4, 32000),  # of the usual 1.1B Llama: 22 layers
}
MIXTURES = {
    "moe": Mixture(1024, 768, 16, 4, 8192, 64, 8),
    "moe-small": Mixture(512, 384, 8, 2, 8192, 8, 2),
    "1b-active": Mixture(
        2048, 1024, 16, 4, 32000, 16, 8
    ),  # 16 layers: 1.04B weights per token of 1.9B, 3.9 GB bf16
}


class _Checkpoint:
    """The shards of a folder, one for each of `layers` blocks and one for the rest."""

    def __init__(self, folder: Path, layers: int, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.layers = folder, layers
        self._generator = torch.Generator().manual_seed(seed)
        self._weight_map: dict[str, str] = {}
        self._total = 0

    def normal(self, *shape: int) -> torch.Tensor:
        """A random weight."""
        return (torch.randn(shape, generator=self._generator) * 0.02).bfloat16()

    def later(self, *shape: int) -> Streamed:
        """A random weight that is made while it is written."""
        return Streamed("BF16", shape, lambda: iter([self.normal(*shape)]))

    def write(self, number: int, tensors: Mapping[str, Entry]) -> None:
        """One shard. number: of its block; as many as there are blocks for the rest."""
        file = shard_name(number, self.layers + 1)
        written = write_shard(self.folder / file, tensors)
        self._weight_map.update(dict.fromkeys(written.tensors, file))
        self._total += sum(written.tensors.values())

    def finish(self, shape: Shape | Mixture, changes: Mapping[str, Any]) -> Path:
        """Write embedding, head, index, config.json and the tokenizer. changes: what the config says of this model."""
        rows = shape.vocabulary, shape.hidden
        self.write(
            self.layers,
            {
                "model.embed_tokens.weight": self.normal(*rows),
                "lm_head.weight": self.normal(*rows),
                "model.norm.weight": ones(shape.hidden),
            },
        )
        index = {"metadata": {"total_size": self._total}, "weight_map": self._weight_map}
        write_json(self.folder / "model.safetensors.index.json", index)
        config = json.loads((assets.default_model() / "config.json").read_text())
        config |= {
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocabulary,
            "num_hidden_layers": self.layers,
            "tie_word_embeddings": False,
        }
        write_json(self.folder / "config.json", config | changes)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(assets.default_model() / name, self.folder / name)
        return self.folder


def ones(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bfloat16)


def make(folder: Path, layers: int, seed: int = 0, shape: Shape = SHAPES["memory"]) -> Path:
    """Write the checkpoint of a Llama."""
    hidden, intermediate = shape.hidden, shape.intermediate
    out = _Checkpoint(folder, layers, seed)
    for i in range(layers):
        at = f"model.layers.{i}"
        tensors: dict[str, Entry] = {}
        outputs = {"q": hidden, "k": shape.kv_heads * shape.head_dim, "v": shape.kv_heads * shape.head_dim}
        tensors |= {
            f"{at}.self_attn.{p}_proj.weight": out.normal(outputs.get(p, hidden), hidden) for p in "qkvo"
        }
        tensors |= {f"{at}.mlp.{p}_proj.weight": out.normal(intermediate, hidden) for p in ("gate", "up")}
        tensors[f"{at}.mlp.down_proj.weight"] = out.normal(hidden, intermediate)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = ones(hidden)
        out.write(i, tensors)
    return out.finish(shape, {})


def make_mixture(folder: Path, layers: int, shape: Mixture = MIXTURES["moe"], seed: int = 0) -> Path:
    """Write the checkpoint of a mixture; no more than one tensor is in memory at a time."""
    hidden, intermediate = shape.hidden, shape.intermediate
    out = _Checkpoint(folder, layers, seed)
    for i in range(layers):
        at = f"model.layers.{i}"
        outputs = {"k": shape.kv_heads * shape.head_dim, "v": shape.kv_heads * shape.head_dim}
        tensors: dict[str, Entry] = {
            f"{at}.self_attn.{p}_proj.weight": out.later(outputs.get(p, hidden), hidden) for p in "qkvo"
        }
        for norm in ("q_norm", "k_norm"):
            tensors[f"{at}.self_attn.{norm}.weight"] = ones(shape.head_dim)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = ones(hidden)
        tensors[f"{at}.mlp.gate.weight"] = out.later(shape.experts, hidden)
        for e in range(shape.experts):
            tensors[f"{at}.mlp.experts.{e}.gate_proj.weight"] = out.later(intermediate, hidden)
            tensors[f"{at}.mlp.experts.{e}.up_proj.weight"] = out.later(intermediate, hidden)
            tensors[f"{at}.mlp.experts.{e}.down_proj.weight"] = out.later(hidden, intermediate)
        out.write(i, tensors)
    kind = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": intermediate,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return out.finish(shape, kind)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shape", choices=(*SHAPES, *MIXTURES), default="memory")
    parser.add_argument("--experts", type=int, help="of a mixture, instead of those of the shape")
    arguments = parser.parse_args()
    if mixture := MIXTURES.get(arguments.shape):
        shape = mixture._replace(experts=arguments.experts or mixture.experts)
        print(make_mixture(arguments.out, arguments.layers, shape))
    else:
        print(make(arguments.out, arguments.layers, shape=SHAPES[arguments.shape]))


if __name__ == "__main__":
    main()
