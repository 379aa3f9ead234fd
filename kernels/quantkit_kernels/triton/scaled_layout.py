"""The storage of a weight of 8-bit products: codes by row, which is how tensor cores take both operands.

codes    int8 or float8_e4m3fn [N, K]
scales   fp32 [ceil(N/rows), K/G]     rows: 128 where each block of 128 rows has one, else 1
x_scale  fp32 [1], x_zero int32 [1]   the stored range of the inputs, if there is one; no x_zero: it is 0
sums     int32 [N]                    of the rows of codes, with an x_zero
"""

from __future__ import annotations

from typing import Any

import torch

from quantkit_kernels.bits import pack_bits, unpack_bits
from quantkit_kernels.stored import Layout, Spec, Stored

# The number of both operands, by `Spec.inputs`.
NUMBERS = {"int8-range": "int8", "fp8-range": "fp8_e4m3", "fp8-group": "fp8_e4m3"}
GROUP = 128  # columns of "fp8-group"
BLOCK = 128  # rows that share a scale


def refuses(spec: Spec) -> str | None:
    """Why the kernels of 8-bit products do not take a weight, whatever the device; or None."""
    number, size = NUMBERS[spec.inputs], GROUP if spec.inputs == "fp8-group" else spec.k
    if spec.number != number or not spec.symmetric:
        kind = "" if spec.symmetric else "asymmetric "
        return (
            f"inputs in {number} are multiplied by symmetric weights in {number}, not by {kind}{spec.number}"
        )
    if spec.group_size != size:
        wanted = f"groups of {GROUP} columns" if size != spec.k else "one scale per row"
        return f"inputs {spec.inputs} go with {wanted}, not with groups of {spec.group_size}"
    return None


def build(stored: Stored) -> Layout:
    """The layout of a weight that `refuses` says nothing against."""
    spec, given = stored.spec, stored.inputs
    raw = unpack_bits(stored.packed, 8, spec.k).contiguous()
    codes = (raw ^ 128).view(torch.int8) if spec.integers else raw.view(torch.float8_e4m3fn)
    scales, rows = stored.scale.float(), 1
    blocks = scales[::BLOCK]
    if spec.group_size != spec.k and torch.equal(blocks.repeat_interleave(BLOCK, 0)[: spec.n], scales):
        scales, rows = blocks, BLOCK
    tensors = {"codes": codes, "scales": scales.contiguous()}
    if given is not None:
        tensors["x_scale"] = torch.tensor([given.scale], dtype=torch.float32, device=codes.device)
        if given.zero:
            tensors["x_zero"] = torch.tensor([given.zero], dtype=torch.int32, device=codes.device)
            tensors["sums"] = codes.sum(1, dtype=torch.int32)
    facts: dict[str, Any] = {"rows": rows, "scale_dtype": stored.scale.dtype, "inputs": given}
    return Layout(tensors, spec, facts)


def restore(layout: Layout) -> Stored:
    """The inverse of `build`, bit for bit."""
    spec, facts = layout.spec, layout.facts
    raw = layout.tensors["codes"].view(torch.uint8)
    scale = layout.tensors["scales"].repeat_interleave(facts["rows"], 0)[: spec.n].to(facts["scale_dtype"])
    packed = pack_bits(raw ^ 128 if spec.integers else raw, 8)
    return Stored(packed, scale, None, spec, facts["inputs"])
