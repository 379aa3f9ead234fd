"""Tiny random models and packed checkpoints of them, rounded to nearest here, packed by the formats room."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from quantkit.formats.compressed_tensors import pack, quantization_config
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Scheme


def round_to_nearest(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> QuantizedWeight:
    """Min-max RTN of [N, K]."""
    n, k = weight.shape
    w = weight.float().view(n, -1, scheme.group(k))  # (N, K/G, G)
    if scheme.symmetric:
        scale = (w.abs().amax(-1) / (scheme.qmax / 2)).to(dtype)
        zero = torch.full(scale.shape, scheme.midpoint, dtype=torch.uint8)
    else:
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        scale = ((high - low) / scheme.qmax).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, scheme.qmax).to(torch.uint8)
    codes = (w / scale.float()[:, :, None] + zero[:, :, None]).round().clamp(0, scheme.qmax).to(torch.uint8)
    return QuantizedWeight(codes.view(n, k), scale, None if scheme.symmetric else zero, scheme)


def pack_model(model, folder, schemes, ignore=("lm_head",), stored=torch.bfloat16):
    """Write `model` to `folder` with the linears that `schemes(name)` gives a scheme packed.

    Returns a copy of the model in float32 with the dequantized weights: what the packed one computes.
    """
    dense = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    dense.load_state_dict(model.state_dict())
    model.to(stored).save_pretrained(folder)
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    dense.load_state_dict({n: t.float() for n, t in model.state_dict().items()})
    layers = {}
    for name, module in dense.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D) or (scheme := schemes(name)) is None:
            continue
        layers[name] = scheme
        turned = isinstance(module, Conv1D)
        weight = tensors.pop(f"{name}.weight")
        quantized = round_to_nearest(weight.T.contiguous() if turned else weight, scheme, stored)
        values = quantized.dequantize()
        module.weight.data.copy_(values.T if turned else values)
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack(quantized).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config(layers, list(ignore))
    (folder / "config.json").write_text(json.dumps(config))
    return dense.eval()


def random_model(config, seed=0):
    """A model with weights large enough that logits tell layers apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.1 + (1 if parameter.ndim == 1 else 0)
    return model.eval()


def llama_config(**changes):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(sizes | changes))


@pytest.fixture
def packed_llama(tmp_path):
    """make(scheme or function name -> scheme, **config) -> (folder, dense twin)."""

    def make(scheme, **changes):
        schemes = scheme if callable(scheme) else lambda name: None if name == "lm_head" else scheme
        dense = pack_model(random_model(llama_config(**changes)), tmp_path / "packed", schemes)
        return tmp_path / "packed", dense

    return make
