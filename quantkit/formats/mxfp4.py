"""MXFP4 files of gpt-oss, method `mxfp4` of transformers: stacked experts. Decoded as a source, never written.

A parameter P [E, K, N] of E experts, which multiply by their part from the right, stores:

    P_blocks  uint8 [E, N, K/32, 16]  FP4 codes, even columns in the low half
    P_scales  uint8 [E, N, K/32]      e, for the scale 2^(e - 127)

P is called as in a checkpoint that is not quantized, and its axes are those it has there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import ModelError
from quantkit.formats.compressed_tensors_config import CORRUPT
from quantkit.scheme import PRESETS

if TYPE_CHECKING:
    import torch

LEAVES = frozenset({"blocks", "scales"})
JOINT, DENSE = "_", ""
SCHEME = PRESETS["MXFP4A16"]
_BYTES = 16  # of a block of 32 codes


def shape(name: str, stored: Mapping[str, Any]) -> tuple[int, int, int]:
    """[E, K, N] of a parameter, from anything with shapes; ModelError if they do not fit each other."""
    shapes = {leaf: tuple(stored[leaf].shape) for leaf in sorted(LEAVES) if leaf in stored}
    blocks, scales = shapes.get("blocks", ()), shapes.get("scales")
    if len(blocks) != 4 or blocks[3] != _BYTES or scales != blocks[:3] or 0 in blocks:
        raise ModelError(
            f"{name} is stored as {shapes}; MXFP4 experts have blocks [E, N, K/32, 16] and scales [E, N, K/32]; "
            f"{CORRUPT}"
        )
    experts, n, groups, _ = blocks
    return experts, 2 * _BYTES * groups, n


def decode(name: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The parameter [E, K, N], decoded one expert after the other. NaN where a scale is none (e = 255)."""
    import torch

    from quantkit.formats.compressed_tensors import fp4_codes
    from quantkit.numerics.weight import QuantizedWeight

    out = torch.empty(shape(name, tensors), dtype=dtype)
    for part, blocks, scales in zip(out, tensors["blocks"], tensors["scales"], strict=True):
        codes = fp4_codes(blocks.flatten(1))  # (N, K)
        weight = QuantizedWeight(codes, scales.view(torch.float8_e8m0fnu), None, SCHEME.weights)
        part.copy_(weight.dequantize(dtype).T)
    return out
