"""What a recipe says for the words of other tools, so that an error can answer "did you mean".

Keys and values as GPTQModel, AutoGPTQ, AutoAWQ, llm-compressor, AutoRound, ModelOpt and torchao write them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Written, in small letters with "_" for "-" -> the key of a recipe. A text with a space is advice and given as it is.
KEYS: dict[str, str] = {
    # weights
    **dict.fromkeys(
        ("bit", "nbits", "n_bits", "num_bits", "w_bit", "w_bits", "wbits", "weight_bits"), "weights.bits"
    ),
    **dict.fromkeys(
        ("groupsize", "gs", "q_group_size", "w_group_size", "weight_group_size"), "weights.group_size"
    ),
    **dict.fromkeys(("sym", "is_sym", "w_sym", "weight_symmetric"), "weights.symmetric"),
    "zero_point": "weights.symmetric (`zero_point: true` is `symmetric: false`)",
    **dict.fromkeys(("method", "quant_method", "quantization_method", "quantizer", "algo"), "weights.algorithm"),
    **dict.fromkeys(("scheme", "qtype", "quant_type", "w_dtype"), "weights.preset"),
    # options of gptq
    **dict.fromkeys(
        ("desc_act", "act_order", "actorder", "activation_order"),
        "weights.algorithm.order (`desc_act: true` is `order: activation`, false is `order: none`)",
    ),
    **dict.fromkeys(
        ("damp", "damp_percent", "percdamp", "dampening_frac", "damping_frac"), "weights.algorithm.damping"
    ),
    **dict.fromkeys(("block_size", "blocksize"), "weights.algorithm.block"),
    "static_groups": "weights.algorithm.groups (`static_groups: true` is `groups: static`)",
    "mse": "weights.algorithm.range (`range: mse`)",
    **dict.fromkeys(("sequential", "true_sequential"), "weights.algorithm.true_sequential"),
    # calibration
    **dict.fromkeys(
        ("nsamples", "n_samples", "num_samples", "num_calibration_samples", "max_calib_samples", "calib_size"),
        "calibration.samples",
    ),
    **dict.fromkeys(
        ("seqlen", "seq_len", "seq_length", "max_length", "max_seq_length", "max_seq_len", "max_calib_seq_len",
         "model_seqlen", "sequence_len"),
        "calibration.sequence_length",
    ),
    **dict.fromkeys(
        ("dataset", "datasets", "calib_data", "calibration_data", "calibration_dataset", "data_files"),
        "calibration.data",
    ),
    **dict.fromkeys(("path", "name_or_path", "file"), "calibration.data.source"),
    **dict.fromkeys(("text_column", "column", "text_field"), "calibration.data.field"),
    "subset": "calibration.data.config",
    # rules
    **dict.fromkeys(
        ("ignore", "ignored_layers", "exclude", "exclude_modules", "skip_modules", "modules_to_not_convert",
         "not_convert"),
        "rules: one `{match: NAME, skip: true}` for each name",
    ),
    **dict.fromkeys(("dynamic", "layer_config", "overrides", "per_layer"), "rules"),
    **dict.fromkeys(("targets", "target_modules", "pattern", "regex", "layer"), "rules.match"),
    # the rest
    **dict.fromkeys(("model_id", "model_path", "model_name", "model_name_or_path", "pretrained"), "model"),
    **dict.fromkeys(("modifiers", "recipe", "smooth", "rotation"), "transforms"),
    **dict.fromkeys(("n_grid", "grid_size"), "transforms.grid"),
    **dict.fromkeys(("apply_clip", "clipping"), "transforms.clip"),
    **dict.fromkeys(("smoothing_strength", "migration_strength", "smooth_alpha", "sq_alpha"), "transforms.alpha"),
    **dict.fromkeys(("activations", "input_activations", "act_bits", "a_bits"), "inputs"),
    **dict.fromkeys(("kv_cache_scheme", "kv_cache_dtype", "kv_bits"), "kv_cache"),
    **dict.fromkeys(("checkpoint_format", "save_format", "export_format"), "output.format"),
    **dict.fromkeys(
        ("output_dir", "save_dir", "save_path", "export_dir"),
        "the option --output of the command line; a recipe does not name its output",
    ),
    **dict.fromkeys(("tp", "tp_size", "tensor_parallel_size"), "target.tensor_parallel"),
    **dict.fromkeys(("backend", "serve_with"), "target.engine"),
    **dict.fromkeys(("device", "device_map"), "the option --device of the command line"),
}  # fmt: skip

# Values: written -> what a recipe writes.
VALUES: dict[str, str] = {
    **dict.fromkeys(("autogptq", "auto_gptq", "gptqmodel", "gptq_v2"), "gptq"),
    **dict.fromkeys(("nearest", "round", "round_to_nearest", "none", "naive", "datafree"), "rtn"),
    **dict.fromkeys(("autoawq", "auto_awq", "llm_awq"), "awq"),
    **dict.fromkeys(("sq", "smooth", "smooth_quant", "smoothquantmodifier"), "smoothquant"),
    **dict.fromkeys(("int8", "w8", "8bit", "int8_wo"), "W8A16"),
    **dict.fromkeys(("int4", "w4", "4bit", "int4_wo"), "W4A16"),
    **dict.fromkeys(("compressed_tensors", "pack_quantized", "llmcompressor"), "compressed-tensors"),
    **dict.fromkeys(("per_channel", "perchannel", "row", "-1"), "channel"),
    **dict.fromkeys(("act", "actorder", "desc_act"), "activation"),
    **dict.fromkeys(("max", "absmax", "min_max"), "minmax"),
}


def did_you_mean(meant: str | None) -> str:
    """The end of a message, if a word is close."""
    return f"; did you mean {meant}?" if meant else ""


def _plain(written: str) -> str:
    return written.strip().lower().replace("-", "_").replace(" ", "_")


def meant_key(written: str, known: Iterable[str]) -> str | None:
    """The key that is probably meant by `written`, where the keys `known` are understood; None if no word is close.

    A key that belongs elsewhere is given with its whole path.
    """
    known = list(known)
    plain = _plain(written)
    if plain in known:
        return f"`{plain}`"
    meant = KEYS.get(plain)
    if meant is not None:
        path, space, more = meant.partition(" ")
        if space and not more.startswith("("):
            return meant
        leaf = path.rpartition(".")[2]
        return f"`{leaf if leaf in known else path}`{space}{more}"
    return _close(plain, known)


def meant_value(written: object, known: Iterable[str]) -> str | None:
    """The value among `known` that is probably meant by `written`; None if none is close."""
    if not isinstance(written, str):
        return None
    plain = _plain(written)
    by_plain = {_plain(name): name for name in known}
    meant = VALUES.get(plain)
    if plain in by_plain:
        return f"`{by_plain[plain]}`"
    if meant is not None and _plain(meant) in by_plain:
        return f"`{meant}`"
    return _close(plain, by_plain.values())


def _close(plain: str, known: Iterable[str]) -> str | None:
    by_plain = {_plain(name): name for name in known}
    found = difflib.get_close_matches(plain[:100], by_plain, n=1, cutoff=0.7)
    return f"`{by_plain[found[0]]}`" if found else None
