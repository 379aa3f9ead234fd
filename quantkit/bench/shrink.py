"""Tiny configs of every model type: the default config of a type with its sizes made small, by the names of its fields.

Widths become 64, heads 4 of 16, the vocabulary 160. Of the layers one of each kind stays, and at least two. What the
names do not decide is tried: `shrunk` yields several configs, and the caller takes the first that builds and runs. What
no general rule gets right is data, `shrink.json`: {model type: {field: value}}.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VOCABULARY, WIDTH, HEADS, HEAD, POSITIONS = 160, 64, 4, 16, 128
SPECIAL = 130  # ids of placeholders (images, sounds) start here, so that no text holds one
MOST_LAYERS = 6

# The first pattern that fits the whole name of a field decides its value; larger numbers only, never smaller ones.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size", 2),
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (r"max_position_embeddings|n_positions|.*_positions|max_seq_len|context_length|n_ctx|seq_length", POSITIONS),
    (r"moe_.*(size|dim)|.*expert.*(size|dim)|expert_.*hidden.*", 32),
    (r".*(intermediate|ffn|inner|mlp|feed_forward|ff)(_hidden)?_?(size|dim)|d_ff|n_inner|ffn_config", 128),
    (r".*(num|n)_(global_)?(key_value|kv)_heads(_.*)?", 2),
    (r"mamba_(n|num)_heads|n_mamba_heads", 8),
    (r"linear_num_key_heads", 2),
    (r"(.*_)?(num_attention_heads|n_heads?|num_heads|attention_heads|num_.*_heads)(_.*)?", HEADS),
    (r"(qk|v|k|q|kv|index|global|swa|linear|mamba|attention|local|.*attn).*head_?dim|mamba_d_head|.*_d_head", HEAD),
    (r"head_dim|head_size|d_head|d_kv|.*_head_dim|kv_channels|headdim|rotary_dim", HEAD),
    (r".*_rank|.*_rank_.*|time_step_rank", HEAD),
    (r".*state_size|.*d_state|ssm_state_.*", HEAD),
    (r"(max_)?(.*_)?sliding_window(_size)?|window_size|attention_window_size|local_window_size", 8),
    (r".*chunk_?size.*|block_size", 16),
    (r"(num|n)_(routed_|local_)?experts|.*num_experts|num_routed_experts|n_routed_experts", 4),
    (r"num_experts_per_tok|.*top_?k|moe_k|num_experts_per_token", 2),
    (r"n_groups?|topk_groups?|num_expert_groups?", 1),
    (r"(.*_)?(hidden|embed(ding)?|width|lru|model|proj(ection|ector)?|conv|output|input|attn|feature)_?(size|dim|width)",
     WIDTH),
    (r"d_model|n_embd|dim|embed_dim|hidden_dim|width|hidden|.*_hidden_size|.*_width|dim_model", WIDTH),
    (r"hidden_size_per_layer_input", HEAD),
)  # fmt: skip
_SIZES_COMPILED = tuple((re.compile(pattern), size) for pattern, size in _SIZES)
_LAYERS = re.compile(
    r"(.*_)?(num_hidden_layers|n_layers?|num_layers|layers|depth|num_blocks|n_blocks|num_layer)"
)
_TOKEN = re.compile(r".*_(token|sequence)_?(id|index|ids)|.*_token_id_.*|.*_id|.*_index")
_ORDINARY = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "decoder_start_token_id": 1,
}
_UNSAID = {
    "head_dim": HEAD,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
}  # what a class leaves at None
_NO_TOKEN = re.compile(r".*(ignore|layer|codebook|head_in).*")


@dataclass(frozen=True)
class Strategy:
    """What is tried where the names of fields do not decide.

    grouped: fewer key and value heads than heads. cap: numbers that no name decides are at most this; None: they stay.
    layers: at least so many.
    """

    grouped: bool = True
    cap: int | None = None
    layers: int = 2


STRATEGIES = (
    Strategy(),
    Strategy(grouped=False),
    Strategy(cap=64),
    Strategy(grouped=False, cap=64),
    Strategy(layers=4),
    Strategy(grouped=False, layers=4, cap=64),
)


def fixes() -> dict[str, dict[str, Any]]:
    """What no general rule gets right: {model type: {field: value}}."""
    found: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text())
    return found


def shrunk(kind: type[PreTrainedConfig]) -> Iterator[PreTrainedConfig]:
    """Tiny configs of a class, one for each strategy; what fails in transformers is left out, but for the last."""
    failed: Exception | None = None
    some = False
    for strategy in STRATEGIES:
        try:
            found = tiny(_default(kind), strategy)
        except Exception as error:  # a check of the config's own
            failed = error
            continue
        some = True
        yield found
    if not some and failed is not None:
        raise failed


def _default(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    config = kind(**fixes().get(kind.model_type, {}).get("_start", {}))
    for name in getattr(config, "sub_configs", {}) or {}:
        if getattr(config, name, None) is None:
            sub = config.sub_configs[name]
            if sub.__name__ != "AutoConfig":
                setattr(config, name, sub())
    return config


def tiny(
    config: PreTrainedConfig, strategy: Strategy, counts: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """A config of the same class with small sizes. counts: values for this config that are decided already."""
    values = _values(config)
    mended = fixes().get(config.model_type, {})
    depth = _depth(values)
    kept = _kept_layers(values, depth, mended.get("_layers", strategy.layers))
    changed: dict[str, Any] = {}
    given = _given(config, values)
    token = SPECIAL
    for name, value in values.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            changed[name] = tiny(value, strategy).to_dict()
        elif (
            isinstance(value, list | tuple) and depth and len(value) == depth and not _is_numbers(value, name)
        ):
            changed[name] = [value[i] for i in kept]
        elif type(value) is int:
            new = _small(name, value, values, len(kept), strategy)
            if _TOKEN.fullmatch(name) and not _NO_TOKEN.fullmatch(name):
                new = _ORDINARY.get(name, token)
                token += name not in _ORDINARY
            if new != value:
                changed[name] = new
        elif value is None and name in _UNSAID:
            changed[name] = _UNSAID[name]
        elif name in ("eos_token_id", "pad_token_id", "bos_token_id") and isinstance(value, list):
            changed[name] = _ORDINARY[name]
        elif name == "is_decoder" and value is False:
            changed[name] = True
        elif name == "rope_parameters" and isinstance(value, dict):
            changed[name] = _rope(value)
        if name not in changed and name in given:
            changed[name] = value
    fitted = {k: v for k, v in mended.items() if not k.startswith("_")} | dict(counts or {})
    for name, value in fitted.items():
        inner, _, leaf = name.partition(".")
        if leaf:
            changed.setdefault(inner, {})[leaf] = value
        else:
            changed[name] = value
    if "tie_word_embeddings" not in changed and isinstance(values.get("tie_word_embeddings"), bool):
        changed["tie_word_embeddings"] = values["tie_word_embeddings"]
    return type(config)(**changed)


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config and what they are once the class has filled them in."""
    names = [n for n in getattr(type(config), "__dataclass_fields__", {}) if not n.startswith("_")]
    given = {n: _value(config, n) for n in names or config.to_dict()}
    skipped = {
        "model_type",
        "transformers_version",
        "architectures",
        "id2label",
        "label2id",
        "chunk_size_feed_forward",
    }
    return {n: v for n, v in given.items() if n not in skipped}


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field of a config; where layers differ in it (transformers then raises), the default of its class."""
    try:
        return getattr(config, name, None)
    except (AttributeError, ValueError, RuntimeError):
        return type(config).__dataclass_fields__[name].default


def _given(config: PreTrainedConfig, values: Mapping[str, Any]) -> set[str]:
    """The plain fields of a part of a config that are not what its class has by default."""
    try:
        usual = _values(type(config)())
    except Exception:  # a class that wants to be told something
        return set()
    plain = (bool, int, float, str)
    return {n for n, v in values.items() if isinstance(v, plain) and n in usual and usual[n] != v}


def _depth(values: Mapping[str, Any]) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"):
        if type(values.get(name)) is int:
            return int(values[name])
    return None


def _is_numbers(value: list[Any] | tuple[Any, ...], name: str) -> bool:
    return len(value) < 5 and all(type(item) is int for item in value)


def _kept_layers(values: Mapping[str, Any], depth: int | None, least: int) -> list[int]:
    """Which layers stay: the first of each kind, in order, and at least `least`."""
    lists = [v for n, v in values.items() if isinstance(v, list | tuple) and depth and len(v) == depth]
    if not depth:
        return list(range(least))
    seen: dict[Any, int] = {}
    for i in range(depth):
        seen.setdefault(tuple(json.dumps(v[i], default=str) for v in lists), i)
    kept = sorted(seen.values())[:MOST_LAYERS] if lists else []
    for i in range(depth):
        if len(kept) >= least:
            break
        if i not in kept:
            kept.append(i)
    return sorted(kept) if kept else list(range(least))


def _small(name: str, value: int, values: Mapping[str, Any], layers: int, strategy: Strategy) -> int:
    if _LAYERS.fullmatch(name):
        return min(value, layers) if value > 0 else value
    for pattern, size in _SIZES_COMPILED:
        if pattern.fullmatch(name):
            if "heads" in pattern.pattern and "key_value" in pattern.pattern:
                size = HEADS if not strategy.grouped else size
                whole = next((values[n] for n in ("num_attention_heads", "n_head") if n in values), None)
                size = HEADS if whole == value else size
            return min(value, size)
    if strategy.cap is not None and value > strategy.cap:
        return strategy.cap
    return value


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose sections (of images) fit a head of 16."""
    own = copy.deepcopy(rope)
    for part in (own, *(v for v in own.values() if isinstance(v, dict))):
        section = part.get("mrope_section")
        if isinstance(section, list):
            half = int(HEAD * float(part.get("partial_rotary_factor", 1.0))) // 2
            each = max(1, half // len(section))
            part["mrope_section"] = [half - each * (len(section) - 1), *[each] * (len(section) - 1)]
        if "original_max_position_embeddings" in part:
            part["original_max_position_embeddings"] = POSITIONS // 2
    return own
