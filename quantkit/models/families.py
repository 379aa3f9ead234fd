"""What differs between model families, as tables; a family that is not listed is treated as ordinary.

In an ordinary family linears are `nn.Linear` ([N, K] on disk). Which parameter a tensor on disk belongs to is no table
of ours: transformers says it (`places.py`). The tables about names serve what runs before a model is built, and they
say what the model does not: which tensors are left out, and which parts of a name belong to a tower.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Siblings (linears of a block that share an input) that engines fuse into one and that therefore share a scheme.
SIBLINGS = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
)

# Parts of the names of linears whose output goes into attention logits, where a weight's own output error
# misleads.
ATTENTION_LOGIT_NAMES = ("q_proj", "k_proj", "qkv", "query", "key", "c_attn")

# Subclasses of nn.Linear with a forward of their own that computes the same (Falcon rounds before it adds the bias).
LINEARS = frozenset({"FalconLinear"})

HEADS = frozenset({"lm_head", "embed_out"})  # how the output head is called on disk

# Parts of names of what sees or hears, and of what leads from there to the language model: carried as it is.
TOWERS = frozenset(
    ("visual", "vision", "vision_tower", "vision_model", "vision_encoder", "vision_embedder", "vision_embed",
     "vision_resampler", "vit", "vqmodel", "protein_encoder", "image_newline", "image_encoder", "image_projection",
     "image_embed", "audio", "audio_tower", "audio_model", "audio_encoder", "audio_embed", "audio_projection",
     "speech_encoder", "embed_vision", "embed_audio", "embed_tokens_extend", "multi_modal_projector", "mm_projector",
     "connector", "aligner", "merger", "projector", "qformer", "query_tokens", "language_projection", "mlp1",
     "code2wav", "talker", "token2wav", "code_predictor")
)  # fmt: skip

# model_type -> the module that reads a text alone, where the forward of the whole model wants a picture.
READERS = {
    "blip-2": "language_model",
    "instructblip": "language_model",
    "instructblipvideo": "language_model",
    "kosmos-2": "text_model",
}

# config.json keys of the part of a model that is its language model, outermost first.
TEXT_CONFIGS = ("thinker_config", "text_config", "llm_config", "language_config")

# Tensors of layers that predict further tokens (MTP): by name, or in a block beyond the last decoder block.
MTP = re.compile(r"(^|\.)mtp(_layers|_block|_head)?\.")
MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
MTP_BLOCK = re.compile(r"\.(enorm|hnorm|eh_proj|shared_head)(\.|$)")

# Tensors older checkpoints carry and today's models compute: (pattern of the disk name, reason).
DROPPED = (
    (r"(^|\.)rotary_emb\.inv_freq$", "rotary table, computed from config.json"),
    (r"(^|\.)rotary_emb\.(cos|sin)_cached$", "rotary table, computed from config.json"),
    (r"(^|\.)position_ids$", "running numbers, computed"),
)


@dataclass(frozen=True)
class Family:
    """Exceptions of one `model_type`.

    conv1d: last name parts of linears stored transposed, [K, N].
    dropped: like DROPPED, for this family.
    tied: whether the head is tied to the embedding when config.json does not say.
    """

    conv1d: frozenset[str] = frozenset()
    dropped: tuple[tuple[str, str], ...] = ()
    tied: bool = False


_MASK = "causal mask, built by the attention"
CONV1D = frozenset({"c_attn", "q_attn", "c_fc", "c_proj"})
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
    "gpt2": Family(conv1d=CONV1D, dropped=_GPT2_MASKS, tied=True),
    "gpt_neox": Family(dropped=((r"(^|\.)attention\.(bias|masked_bias)$", _MASK),)),
    "falcon": Family(tied=True),
}

# Families without a promise whose only exception is known.
OTHERS: dict[str, Family] = {
    "bloom": Family(tied=True),
    "codegen": Family(dropped=((r"(^|\.)attn\.causal_mask$", _MASK),)),
    "gpt_bigcode": Family(tied=True, dropped=_GPT2_MASKS),
    "gpt_neo": Family(tied=True, dropped=((r"\.attention\.(bias|masked_bias)$", _MASK),)),
    "gptj": Family(dropped=_GPT2_MASKS),
    "mpt": Family(tied=True),
    "openai-gpt": Family(conv1d=CONV1D, dropped=_GPT2_MASKS, tied=True),
}

# How the experts of a mixture are called.
EXPERT_TENSOR = re.compile(r"(^|\.)(experts|(in|out)put_linear\.\d+)(\.|$)")

# Linears of decoder blocks that are left as they are unless a rule names them: (pattern of the module name, reason).
# They are a fraction of the weights, and what they decide (which expert, how fast a state decays) is not averaged out.
_ROUTER = re.compile(r"(^|\.)router(\.|$)|\.(gate|wg|shared_expert_gate)$")
SET_ASIDE = (
    (_ROUTER, "a router or gate of a few rows"),
    (re.compile(r"\.(dt_proj|x_proj)$"), "a time-step projection of a state-space layer"),
    (re.compile(r"\.(in_proj_a|in_proj_b|in_proj_ba)$"), "a decay or gate of linear attention, a few rows"),
    (re.compile(r"\.weights_proj$"), "the head weights of a sparse-attention indexer"),
    (
        re.compile(r"\.altup\.\w+$"),
        "mixes a handful of predictions of a layer (AltUp), a few rows or columns",
    ),
)

_ANY_ASIDE = re.compile("|".join(pattern.pattern for pattern, _ in SET_ASIDE))

# What names alone say where no model class can be asked (`names.py`): 2-D tensors that are no linears, whatever a rule
# says, (pattern of the name without `.weight`, reason),
TABLES = (
    (re.compile(r"(embed|wte|wpe)[^.]*$|(^|\.)shared$"), "a table of embeddings"),
    (
        re.compile(r"(^|[._])(rel(ative)?_?pos|relative_attention|pos(ition)?_?(bias|emb))[^.]*$"),
        "a table of positions",
    ),
    (re.compile(r"norm[^.]*$|(^|\.)ln(_\w+)?$"), "a norm"),
    (re.compile(r"conv(1d|2d|3d|_\w+)?$"), "a convolution"),
)
ANY_TABLE = re.compile("|".join(f"(?:{pattern.pattern})" for pattern, _ in TABLES))
# and linears that are left unless a rule names them, beside SET_ASIDE.
BY_NAME = (
    (re.compile(r"(^|\.)(lm_head|embed_out)$"), "an output head"),
    (
        re.compile(r"\.gate\.(wg|linear|proj)$|\.(classifier|routing|expert_gate)$"),
        "a router or gate of a few rows",
    ),
    (re.compile(r"(^|[._])lora_[ABab]?(\.|$)|(^|[._])(lora|adapter)[^.]*(\.|$)"), "an adapter of low rank"),
    (re.compile(r"\.(enorm|hnorm|eh_proj|shared_head)(\.|$)"), "a layer that predicts further tokens (MTP)"),
)
FEWEST = 16  # rows or columns that a weight has at least to be taken for a linear

# model_type -> (key of config.json, the only value with which it is supported, why).
UNSUPPORTED: dict[str, tuple[str, Any, str]] = {
    "rwkv": (
        "rescale_every",
        0,
        "its forward halves the weights of linears in place, against overflow in fp16; with rescale_every: 0 in "
        "config.json it computes the same without that, and is supported",
    ),
}


def family(model_type: str) -> Family:
    """The table entry, or an ordinary family for a type that is not listed."""
    return FAMILIES.get(model_type) or OTHERS.get(model_type) or Family()


def is_conv1d(model_type: str, module: str) -> bool:
    """Whether a linear of this name is stored as [K, N]."""
    return module.rpartition(".")[2] in family(model_type).conv1d


def set_aside(module: str) -> str | None:
    """Why a linear of this name is left as it is unless a rule names it, or None."""
    if not _ANY_ASIDE.search(module):
        return None
    return next((reason for pattern, reason in SET_ASIDE if pattern.search(module)), None)


def is_router(module: str) -> bool:
    """Whether a linear of this name decides where tokens go."""
    return _ROUTER.search(module) is not None


def dropped(model_type: str, names: Iterable[str]) -> dict[str, str]:
    """Of tensors by their names on disk, those that transformers leaves out -> why."""
    known = DROPPED + family(model_type).dropped
    search = re.compile("|".join(pattern for pattern, _ in known)).search  # names are many, matches few
    return {
        name: next(reason for pattern, reason in known if re.search(pattern, name))
        for name in names
        if search(name)
    }


def is_head(module: str) -> bool:
    """Whether a module of this name is the output head."""
    return module.rpartition(".")[2] in HEADS


def may_be_infinite(name: str) -> bool:
    """Whether a tensor is a bound of a tower (`input_max`), which is infinite where nothing is clipped."""
    return name.rpartition(".")[2] not in ("weight", "bias") and tower(name) is not None


def tower(name: str) -> str | None:
    """The part of a name that says it belongs to a tower or a projector, or None."""
    return next((part for part in name.split(".") if part in TOWERS), None)
