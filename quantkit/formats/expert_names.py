"""The names of experts in a config's `ignore` and `targets`: as on disk, and as vLLM asks for them.

vLLM takes the scheme of a layer's experts from those of `gate_proj`, `up_proj` and `down_proj` of the first one,
however they are called on disk (its compressed_tensors_moe.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EXPERT = re.compile(r"^(.*experts)\.\d+\.([^.]+)$")  # (experts of a layer, name of a linear)
ASKED = ("gate_proj", "up_proj", "down_proj")


def holders(names: Iterable[str]) -> set[str]:
    """The modules that hold the experts among some linears: "model.layers.0.mlp.experts"."""
    return {match[1] for name in names if (match := EXPERT.match(name))}


def asked(names: Iterable[str]) -> list[str]:
    """What vLLM asks for to know the scheme of the experts among some linears, sorted."""
    return [f"{holder}.0.{leaf}" for holder in sorted(holders(names)) for leaf in sorted(ASKED)]


def asked_of_left(left: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """The same for experts of layers in which none is quantized. left, quantized: names of linears."""
    packed = holders(quantized)
    return [name for name in asked(left) if holders([name]) - packed]
