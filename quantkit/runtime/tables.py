"""Turn a loaded transformers model into the native decoder's tables, or say why that is not possible.

The tables point at the model's own weights; only norms and biases are copied, as fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from quantkit_kernels import Spec, Stored, pack_bits, unpack_bits
from quantkit_kernels.cpu import layout as native
from quantkit_kernels.cpu.decoder import TYPES, Layer, Matrix, Mixture, Norm, Tables
from quantkit_kernels.cpu.layout import Packed, packed_of
from torch import nn
from transformers.activations import SiLUActivation

from quantkit.errors import BackendError
from quantkit.layers.kv_cache import OWN_HOOKS, attached
from quantkit.layers.quant_linear import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ROUNDED = ("int8-range", "fp8-range", "fp8-group")  # computes that a checkpoint asks for


@dataclass(frozen=True)
class Names:
    """Module names of a family; fused linears have one name."""

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    activation: str = "act_fn"
    mixture: Routing | None = None


@dataclass(frozen=True)
class Routing:
    """How a family's blocks of experts choose: the softmax of all logits, then the largest.

    normalise: the config key that says whether the chosen weights are divided by their sum; None: they always are.
    shared: names of an expert for all tokens and of its gate of one row, or ().
    """

    normalise: str | None = "norm_topk_prob"
    shared: tuple[str, ...] = ()


FAMILIES = {
    "llama": Names(),
    "mistral": Names(),
    "qwen2": Names(),
    "qwen3": Names(),
    "phi3": Names(("qkv_proj",), ("gate_up_proj",), "activation_fn"),
    "mixtral": Names(mixture=Routing(None)),
    "olmoe": Names(mixture=Routing()),
    "qwen2_moe": Names(mixture=Routing(shared=("shared_expert", "shared_expert_gate"))),
    "qwen3_moe": Names(mixture=Routing()),
}


class NotNative(Exception):
    """The reason why a model runs in transformers instead."""


def tables(model: PreTrainedModel, compute: str = "float") -> Tables:
    """The tables of a causal LM. NotNative with the reason if its family, a module or a weight does not fit.

    compute: of its packed linears; "float" leaves those whose inputs the checkpoint rounds as they are (`ROUNDED`).
    """
    config = model.config
    names = FAMILIES.get(config.model_type)
    if names is None or not type(model).__module__.startswith("transformers.models."):
        known = ", ".join(FAMILIES)
        raise NotNative(f"the native path knows {known}, not {type(model).__name__} ({config.model_type})")
    _refuse_changed(model)
    base = model.model
    scales = _kv_scales(model, config.num_key_value_heads)
    layers = tuple(
        _layer(f"model.layers.{i}", block, names, config, scales[i], compute)
        for i, block in enumerate(base.layers)
    )
    attention = base.layers[0].self_attn
    return Tables(
        layers=layers,
        embedding=Matrix(_dense("model.embed_tokens", base.embed_tokens.weight)),
        head=_matrix("lm_head", model.lm_head, compute),
        final=_norm("model.norm", base.norm),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        rotary_dim=base.rotary_emb.inv_freq.numel() * 2,
    )


def _refuse_changed(model: PreTrainedModel) -> None:
    """Refuse hooks, replaced forwards and offloaded weights, which the native decoder would silently ignore."""
    for name, module in model.named_modules():
        name = name or type(model).__name__
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(hook not in OWN_HOOKS for hook in hooks):
            raise NotNative(f"{name} has forward hooks")
        if "forward" in vars(module):
            raise NotNative(f"the forward of {name} was replaced")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise NotNative(f"{name} is on {tensor.device.type}, not on the CPU")


def _layer(
    name: str,
    block: Any,
    names: Names,
    config: Any,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None,
    compute: str,
) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    if getattr(config, "clip_qkv", None) is not None:
        raise NotNative(f"{name}.self_attn clips queries, keys and values to {config.clip_qkv}")

    def linears(parent: nn.Module, path: str, parts: tuple[str, ...]) -> tuple[Matrix, ...]:
        return tuple(_matrix(f"{name}.{path}.{part}", getattr(parent, part), compute) for part in parts)

    window = getattr(attention, "sliding_window", None)
    if not hasattr(attention, "sliding_window"):  # the family has one for all layers, or none
        window = getattr(config, "sliding_window", None)
    per_head: dict[str, Any] = {
        part: _norm(f"{name}.self_attn.{part}", getattr(attention, part))
        for part in ("q_norm", "k_norm")
        if hasattr(attention, part)
    }
    return Layer(
        input=_norm(f"{name}.input_layernorm", block.input_layernorm),
        post=_norm(f"{name}.post_attention_layernorm", block.post_attention_layernorm),
        qkv=linears(attention, "self_attn", names.qkv),
        o=_matrix(f"{name}.self_attn.o_proj", attention.o_proj, compute),
        scale=attention.scaling,
        whole_norms=bool(per_head) and per_head["q_norm"].weight.numel() > attention.head_dim,
        **_inner(f"{name}.mlp", mlp, names, config, compute),
        kv_scales=kv_scales,
        window=window,
        **per_head,
    )


def _inner(name: str, mlp: Any, names: Names, config: Any, compute: str) -> dict[str, Any]:
    """The fields of a `Layer` that say what its MLP is: gate, up and down, or a mixture of experts."""
    if names.mixture is not None and hasattr(mlp, "experts"):
        return {"gate_up": (), "down": None, "mixture": _mixture(name, mlp, names.mixture, config, compute)}
    return dict(zip(("gate_up", "down"), _gated(name, mlp, names, compute), strict=True))


def _gated(name: str, mlp: Any, names: Names, compute: str) -> tuple[tuple[Matrix, ...], Matrix]:
    """(gate and up or both in one, down) of an MLP."""
    _refuse_activation(name, getattr(mlp, names.activation))
    inner = tuple(_matrix(f"{name}.{part}", getattr(mlp, part), compute) for part in names.gate_up)
    return inner, _matrix(f"{name}.down_proj", mlp.down_proj, compute)


def _mixture(name: str, mlp: Any, routing: Routing, config: Any, compute: str) -> Mixture:
    """The experts of a block, which are packed linears one by one."""
    experts, gate = mlp.experts, mlp.gate
    if not getattr(type(experts), "is_experts", False):
        raise NotNative(f"{name}.experts are not packed")
    _refuse_activation(f"{name}.experts", experts.act_fn)

    def linears(number: int, *roles: str) -> tuple[Matrix, ...]:
        names = [f"{number}.{experts.names[role]}" for role in roles]
        return tuple(
            _expert(f"{name}.experts.{each}", experts.get_submodule(each), compute) for each in names
        )

    count = experts.shape.experts
    inner = tuple(linears(number, "gate", "up") for number in range(count))
    if len({_activations(part) for pair in inner for part in pair}) > 1:
        raise NotNative(f"{name}.experts: gate and up of all experts are stored in one way, here they differ")
    shared, switch = None, None
    if routing.shared:
        own, leaf = routing.shared
        shared = _shared(f"{name}.{own}", getattr(mlp, own), compute)
        switch = _matrix(f"{name}.{leaf}", getattr(mlp, leaf), compute)
        if isinstance(switch.weight, Packed):
            raise NotNative(f"{name}.{leaf} is packed, and the native path takes it as floats")
    return Mixture(
        router=Matrix(_dense(f"{name}.gate", gate.weight)),
        gate_up=tuple((gate_, up) for gate_, up in inner),
        down=tuple(linears(number, "down")[0] for number in range(count)),
        top=gate.top_k,
        normalise=routing.normalise is None or bool(getattr(config, routing.normalise)),
        shared=shared,
        switch=switch,
    )


def _expert(name: str, module: nn.Module, compute: str) -> Matrix:
    if not isinstance(module, QuantLinear):
        raise NotNative(f"{name} is not packed")
    return _packed(name, module, compute)


def _activations(matrix: Matrix) -> tuple[Any, ...]:
    """What prepared inputs depend on (`qk::same_activations`)."""
    assert isinstance(matrix.weight, Packed)
    return matrix.weight.spec.number, matrix.weight.spec.group_size, matrix.weight.inputs, matrix.compute


def _shared(name: str, mlp: Any, compute: str) -> tuple[Matrix, Matrix, Matrix]:
    """Gate, up and down of the expert that all tokens have."""
    _refuse_activation(name, mlp.act_fn)
    gate, up, down = (
        _expert(f"{name}.{leaf}", getattr(mlp, leaf), compute)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    )
    return gate, up, down


def _refuse_activation(name: str, activation: Any) -> None:
    if not isinstance(activation, (nn.SiLU, SiLUActivation)):
        raise NotNative(f"{name} uses {type(activation).__name__}, not SiLU")


def _kv_scales(model: PreTrainedModel, heads: int) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """The stored scales of every layer's cache, fp32 [kv_heads] each; None without."""
    told = attached(model)
    count = model.config.num_hidden_layers
    if told is None or told.scales is None:
        return [None] * count
    pairs = ((told.scales[i].keys, told.scales[i].values) for i in range(count))
    return [(_fp32(k.reshape(-1).expand(heads)), _fp32(v.reshape(-1).expand(heads))) for k, v in pairs]


def _norm(name: str, module: Any) -> Norm:
    if not type(module).__name__.endswith("RMSNorm"):
        raise NotNative(f"{name} is a {type(module).__name__}, not an RMSNorm")
    return Norm(_fp32(module.weight), module.variance_epsilon)


def _matrix(name: str, module: nn.Module, compute: str) -> Matrix:
    if isinstance(module, QuantLinear):
        return _packed(name, module, compute)
    if type(module) is not nn.Linear:
        raise NotNative(f"{name} is a {type(module).__name__}, not a linear layer")
    return Matrix(_dense(name, module.weight), _bias(module))


def _dense(name: str, weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach()
    if weight.dtype not in TYPES or not weight.is_contiguous():
        raise NotNative(
            f"{name}.weight is {weight.dtype}; the native path takes contiguous fp32, bf16 or fp16"
        )
    return weight


def _packed(name: str, module: QuantLinear, compute: str) -> Matrix:
    """The kernels' layout of a packed linear: the one it already runs on, or built from the stored tensors."""
    inputs = module.scheme.inputs
    if module.ordered:
        raise NotNative(f"{name} gathers its inputs into the order of its columns")
    if inputs is not None and module.compute == "float":
        raise NotNative(f"{name} rounds its inputs to {inputs}, which its kernels do not do")
    if compute.startswith("int8") and not module.spec.integers:
        raise NotNative(f"{name} has codes of {module.spec.number}, which have no compute {compute!r}")
    own = module.compute if module.compute in ROUNDED and compute == "float" else None
    if module.backend == "cpu":
        bias, shift = _bias(module), module.layout.tensors.get("shift") if own else None
        total = bias if shift is None else shift if bias is None else bias + shift
        return Matrix(packed_of(module.layout), total, own)
    try:
        stored = module.stored()
    except BackendError:
        raise NotNative(
            f"{name} runs on backend {module.backend!r}, whose layout the native path cannot read"
        ) from None
    if stored.spec.bits not in native.BITS:
        stored = _widened(stored)
    reason = native.refuses(stored.spec)
    if reason:
        raise NotNative(f"{name}: {reason}")
    return Matrix(native.pack(stored), _bias(module))


def _widened(stored: Stored) -> Stored:
    """The same codes and zero points in 8 bits."""
    spec = stored.spec
    codes = pack_bits(unpack_bits(stored.packed, spec.bits, spec.k), 8)
    if stored.zero_packed is None:
        zeros = torch.full((spec.groups, spec.n), 2 ** (spec.bits - 1), dtype=torch.uint8)
    else:
        zeros = unpack_bits(stored.zero_packed.T, spec.bits, spec.n)
    wide = Spec.integer(8, spec.group_size, False, spec.n, spec.k)
    return Stored(codes, stored.scale, pack_bits(zeros, 8).T.contiguous(), wide)


def _bias(module: nn.Module) -> torch.Tensor | None:
    return None if module.bias is None else _fp32(module.get_parameter("bias"))


def _fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32, copy=True).contiguous()
