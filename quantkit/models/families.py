"""What differs between model families, as tables; a family that is not listed is treated as ordinary.

In an ordinary family linears are `nn.Linear` ([N, K] on disk), tensors carry the module names of transformers'
causal LM, and every tensor on disk is a parameter or buffer of that model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# Siblings (linears of a block that share an input) that engines fuse into one and that therefore share a scheme.
SIBLINGS = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}))

# Parts of the names of linears whose output goes into attention logits, where a weight's own output error
# misleads.
ATTENTION_LOGIT_NAMES = ("q_proj", "k_proj", "qkv", "query", "key", "c_attn")

HEAD = "lm_head"

# Tensors older checkpoints carry and today's models compute: (pattern of the disk name, reason).
DROPPED = (
    (r"(^|\.)rotary_emb\.inv_freq$", "rotary table, computed from config.json"),
    (r"(^|\.)rotary_emb\.(cos|sin)_cached$", "rotary table, computed from config.json"),
    (r"(^|\.)position_ids$", "running numbers, computed"),
)


@dataclass(frozen=True)
class Family:
    """Exceptions of one `model_type`.

    base_prefix: where the causal LM holds its base model; a checkpoint saved from the base model lacks it.
    conv1d: last name parts of linears stored transposed, [K, N].
    renames: (disk prefix, module prefix) of modules that transformers renamed.
    dropped: like DROPPED, for this family.
    tied: whether the head is tied to the embedding when config.json does not say.
    """

    base_prefix: str = "model"
    conv1d: frozenset[str] = frozenset()
    renames: tuple[tuple[str, str], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    tied: bool = False


_MASK = "causal mask, built by the attention"
_GPT2_LINEARS = frozenset({"c_attn", "q_attn", "c_fc", "c_proj"})
_GPT2_MASKS = ((r"(^|\.)attn\.(bias|masked_bias)$", _MASK),)

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": Family(tied=True),
    "gemma3_text": Family(tied=True),
    "phi3": Family(),
    "opt": Family(tied=True),
    "gpt2": Family("transformer", conv1d=_GPT2_LINEARS, dropped=_GPT2_MASKS, tied=True),
    "gpt_neox": Family(
        "gpt_neox",
        renames=(("embed_out.", "lm_head."),),
        dropped=((r"(^|\.)attention\.(bias|masked_bias)$", _MASK),),
    ),
    "falcon": Family("transformer", tied=True),
}

# Families without a promise whose only exception is known.
OTHERS: dict[str, Family] = {
    "bloom": Family("transformer", tied=True),
    "codegen": Family("transformer", dropped=((r"(^|\.)attn\.causal_mask$", _MASK),)),
    "gpt_bigcode": Family("transformer", tied=True, dropped=_GPT2_MASKS),
    "gpt_neo": Family("transformer", tied=True, dropped=((r"\.attention\.(bias|masked_bias)$", _MASK),)),
    "gptj": Family("transformer", dropped=_GPT2_MASKS),
    "mpt": Family("transformer", tied=True),
    "nemotron_h": Family(renames=(("backbone.", "model."),)),
    "openai-gpt": Family("transformer", conv1d=_GPT2_LINEARS, dropped=_GPT2_MASKS, tied=True),
}

# config.json keys whose value above 1 means a mixture of experts, and how experts are called on disk.
EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
EXPERT_TENSOR = re.compile(r"(^|\.)(experts|shared_experts?)\.")
ROUTER_TENSOR = re.compile(r"(^|\.)(router|gate|wg|block_sparse_moe|moe)\.")

# Linears of decoder blocks that are left as they are unless a rule names them: (pattern of the module name, reason).
# They are a fraction of the weights, and what they decide (which expert, how fast a state decays) is not averaged out.
SET_ASIDE = (
    (re.compile(r"(^|\.)router(\.|$)|\.(gate|wg|shared_expert_gate)$"), "a router or gate of a few rows"),
    (re.compile(r"\.(dt_proj|x_proj)$"), "a time-step projection of a state-space layer"),
    (re.compile(r"\.(in_proj_a|in_proj_b|in_proj_ba)$"), "a decay or gate of linear attention, a few rows"),
)

# config.json keys of models that also see or hear.
OTHER_MODALITIES = ("vision_config", "audio_config", "mm_vision_tower")

# model_type -> why it is refused although nothing above shows it.
UNSUPPORTED: dict[str, str] = {
    "mamba": "a state-space model has no attention blocks",
    "mamba2": "a state-space model has no attention blocks",
    "rwkv": "a recurrent model has no attention blocks",
}


def family(model_type: str) -> Family:
    """The table entry, or an ordinary family without base prefix for a type that is not listed."""
    return FAMILIES.get(model_type) or OTHERS.get(model_type) or Family(base_prefix="")


def is_conv1d(model_type: str, module: str) -> bool:
    """Whether a linear of this name is stored as [K, N]."""
    return module.rpartition(".")[2] in family(model_type).conv1d


def set_aside(module: str) -> str | None:
    """Why a linear of this name is left as it is unless a rule names it, or None."""
    return next((reason for pattern, reason in SET_ASIDE if pattern.search(module)), None)


def dropped(model_type: str, name: str) -> str | None:
    """Why transformers leaves out the tensor called `name` on disk, or None."""
    for pattern, reason in DROPPED + family(model_type).dropped:
        if re.search(pattern, name):
            return reason
    return None


def module_names(model_type: str, names: Iterable[str]) -> dict[str, str]:
    """Disk tensor name -> name in transformers' causal LM, for all tensors of one checkpoint."""
    here = family(model_type)
    renamed: dict[str, str] = {}
    for name in names:
        prefix = next((pair for pair in here.renames if name.startswith(pair[0])), ("", ""))
        renamed[name] = prefix[1] + name.removeprefix(prefix[0])
    base = f"{here.base_prefix}." if here.base_prefix else ""
    bare = not any(name.startswith(base) for name in renamed.values())
    return {
        disk: base + name if bare and not name.startswith(f"{HEAD}.") else name
        for disk, name in renamed.items()
    }
