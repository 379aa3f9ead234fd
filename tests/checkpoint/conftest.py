"""Tiny random models and packed checkpoints of them, rounded to nearest here, packed by the formats room."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from quantkit.formats.registry import codec
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import Grid, Scheme, integer


def round_to_nearest(weight: torch.Tensor, grid: Grid, dtype: torch.dtype) -> QuantizedWeight:
    """Min-max RTN of [N, K]."""
    n, k = weight.shape
    w = weight.float().view(n, -1, grid.group(k))  # (N, K/G, G)
    if grid.symmetric:
        scale = (w.abs().amax(-1) / (grid.qmax / 2)).to(dtype)
        zero = torch.full(scale.shape, grid.midpoint, dtype=torch.uint8)
    else:
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        scale = ((high - low) / grid.qmax).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, grid.qmax).to(torch.uint8)
    codes = (w / scale.float()[:, :, None] + zero[:, :, None]).round().clamp(0, grid.qmax).to(torch.uint8)
    return QuantizedWeight(codes.view(n, k), scale, None if grid.symmetric else zero, grid)


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
        quantized = round_to_nearest(weight.T.contiguous() if turned else weight, scheme.weights, stored)
        values = quantized.dequantize()
        module.weight.data.copy_(values.T if turned else values)
        tensors |= {f"{name}.{part}": tensor for part, tensor in codec().pack(quantized).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = codec().config(layers, list(ignore))
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
def random_llama():
    return random_model(llama_config())


@pytest.fixture
def pack_config(tmp_path):
    """make(config, function name -> scheme, ...) -> (folder, dense twin)."""

    def make(config, schemes, **options):
        return tmp_path / "packed", pack_model(random_model(config), tmp_path / "packed", schemes, **options)

    return make


@pytest.fixture
def packed_llama(pack_config):
    """make(scheme or function name -> scheme, ignore, stored dtype, **config) -> (folder, dense twin)."""

    def make(scheme, ignore=("lm_head",), stored=torch.bfloat16, **changes):
        schemes = scheme if callable(scheme) else lambda name: None if name == "lm_head" else scheme
        return pack_config(llama_config(**changes), schemes, ignore=ignore, stored=stored)

    return make


@pytest.fixture(scope="session")
def wide_llamas(tmp_path_factory):
    """(packed folder of 8 layers, of 1 layer, bytes of the 8 layers' linears in float32); random words."""
    root = tmp_path_factory.mktemp("wide")
    scheme, numbers = Scheme(integer(4, 128, True)), torch.Generator().manual_seed(0)
    for layers in (1, 8):
        config = llama_config(
            hidden_size=1024, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=8
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tensors, linears = {}, {}
        for name, place in model.state_dict().items():
            module = name.removesuffix(".weight")
            if ".layers." not in name or place.ndim == 1:
                tensors[name] = torch.full(place.shape, 0.1, dtype=torch.bfloat16)
                continue
            n, k = place.shape
            linears[module] = n * k
            words = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int32, generator=numbers)
            tensors[f"{module}.weight_packed"] = words
            tensors[f"{module}.weight_scale"] = torch.full((n, k // 128), 0.001, dtype=torch.bfloat16)
            tensors[f"{module}.weight_shape"] = torch.tensor([n, k])
        config.quantization_config = codec().config(dict.fromkeys(linears, scheme), ["lm_head"])
        config.save_pretrained(root / str(layers))
        save_file(tensors, root / str(layers) / "model.safetensors", metadata={"format": "pt"})
    return root / "8", root / "1", 4 * sum(linears.values())
