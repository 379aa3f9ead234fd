"""Checkpoints as the preflight sees them, by shapes alone."""

from quantkit.formats.compressed_tensors_config import written_config
from quantkit.preflight.subject import Linear, Subject
from quantkit.scheme import PRESETS, Scheme, integer

FOUR = Scheme(integer(4, 128))
MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama(scheme=FOUR, hidden=1024, inner=2048, kv=512, blocks=1, changed=None, config=None, **more):
    """Decoder blocks in Llama's names; changed: leaf -> its scheme, None for one that is not quantized."""
    shapes = dict.fromkeys(MLP, (inner, hidden)) | dict.fromkeys(ATTENTION, (hidden, hidden))
    shapes |= {"down_proj": (hidden, inner), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    linears = []
    for block in range(blocks):
        for leaf, shape in shapes.items():
            parent = f"model.layers.{block}.{'mlp' if leaf in MLP else 'self_attn'}"
            linears.append(Linear(f"{parent}.{leaf}", shape, (changed or {}).get(leaf, scheme)))
    return subject(linears, {"model_type": "llama", "num_hidden_layers": blocks} | (config or {}), **more)


def subject(linears, config=None, ignore=None, targets=None, **more):
    """With the config that quantkit writes; ignore, targets: put there instead."""
    schemes = {linear.name: linear.scheme for linear in linears if linear.scheme}
    dense = [linear.name for linear in linears if not linear.scheme]
    written = written_config(schemes, dense if ignore is None else ignore) if schemes else {}
    if targets is not None:
        written["config_groups"]["group_0"]["targets"] = targets
    return Subject(linears, config or {"model_type": "llama"}, written, **more)


__all__ = ["FOUR", "PRESETS", "llama", "subject"]
