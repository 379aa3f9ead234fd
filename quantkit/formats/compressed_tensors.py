"""compressed-tensors `pack-quantized`, the format that vLLM, SGLang and transformers load.

Tensors of a linear P with weight [N, K] and K/G groups per row (channel: one):
    P.weight_packed      int32 [N, ceil(K bits / 32)]     unsigned codes, dense, lowest bits first
    P.weight_scale       model dtype [N, K/G]
    P.weight_shape       int64 [2] = (N, K)
    P.weight_zero_point  int32 [ceil(N bits / 32), K/G]   asymmetric only; the same packing along N
The format counts codes from -2^(bits-1) and adds 2^(bits-1) when it packs them: the words hold our unsigned codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from quantkit_kernels import Spec, Stored, pack_bits, unpack_bits, words

from quantkit.errors import ModelError
from quantkit.formats.compressed_tensors_config import (
    CORRUPT,
    METHOD,
    kv_scheme,
    parsed_config,
    written_config,
)
from quantkit.formats.registry import Codec, Shape, register
from quantkit.numerics.weight import QuantizedWeight
from quantkit.scheme import KVScheme, Scheme


@register
class CompressedTensors(Codec):
    """The codec of this format."""

    name = "compressed-tensors"
    method = METHOD
    leaves: ClassVar[dict[str, torch.dtype | None]] = {
        "weight_packed": torch.int32,
        "weight_scale": None,
        "weight_shape": torch.int64,
        "weight_zero_point": torch.int32,
    }
    scale = "weight_scale"

    def shapes(self, n: int, k: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
        grid = scheme.weights
        groups = k // grid.group(k)
        shapes = {
            "weight_packed": (n, words(k, grid.bits)),
            "weight_scale": (n, groups),
            "weight_shape": (2,),
        }
        return shapes if grid.symmetric else shapes | {"weight_zero_point": (words(n, grid.bits), groups)}

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        bits = weight.grid.bits
        tensors = {
            "weight_packed": pack_bits(weight.codes, bits),
            "weight_scale": weight.scale.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if weight.zero is not None:
            tensors["weight_zero_point"] = pack_bits(weight.zero.T.contiguous(), bits).T.contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        grid = scheme.weights
        n, k = self.dimensions(tensors, scheme)
        shapes = self.shapes(n, k, scheme)
        if tensors.keys() != shapes.keys():
            raise ModelError(f"a {scheme} linear has the tensors {sorted(shapes)}, got {sorted(tensors)}")
        for leaf, shape in shapes.items():
            if tuple(tensors[leaf].shape) != shape:
                raise ModelError(
                    f"{leaf} of a {scheme} [{n}, {k}] linear is {shape}, got {tuple(tensors[leaf].shape)}"
                )
        zero = tensors.get("weight_zero_point")
        return QuantizedWeight(
            codes=unpack_bits(tensors["weight_packed"], grid.bits, k).contiguous(),
            scale=tensors["weight_scale"],
            zero=None if zero is None else unpack_bits(zero.T, grid.bits, n).T.contiguous(),
            grid=grid,
        )

    def stored(self, tensors: Mapping[str, torch.Tensor], spec: Spec) -> Stored:
        """The very same tensors."""
        zero = tensors.get("weight_zero_point")
        return Stored(tensors["weight_packed"], tensors["weight_scale"], zero, spec)

    def dimensions(self, tensors: Mapping[str, Any], scheme: Scheme) -> Shape:
        if "weight_shape" not in tensors or "weight_scale" not in tensors:
            raise ModelError(
                f"a {scheme} linear lacks its weight_shape or weight_scale, got {sorted(tensors)}; {CORRUPT}"
            )
        said = tensors["weight_shape"]
        sizes = said.tolist() if said.dtype == torch.int64 and tuple(said.shape) == (2,) else None
        scales = tuple(tensors["weight_scale"].shape)
        grid = scheme.weights
        if sizes is None or min(sizes) < 1 or not grid.divides(sizes[1]):
            raise ModelError(f"weight_shape is {said.flatten()[:4].tolist()}, no shape of a {scheme} weight")
        if scales != (sizes[0], sizes[1] // grid.group(sizes[1])):
            raise ModelError(
                f"weight_shape says {sizes}, which does not fit {list(scales)} scales of a {scheme} weight; {CORRUPT}"
            )
        return sizes[0], sizes[1]

    def config(
        self, schemes: Mapping[str, Scheme], ignore: Sequence[str], kv: KVScheme | None = None
    ) -> dict[str, Any]:
        return written_config(schemes, ignore, kv)

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        return parsed_config(config)

    def kv_scheme(self, config: Mapping[str, Any]) -> KVScheme | None:
        return kv_scheme(config)

    def why_misfit(self, leaf: str, shape: tuple[int, ...], n: int, k: int, scheme: Scheme) -> str | None:
        older = -(-k // (32 // scheme.weights.bits))
        if leaf == "weight_packed" and shape and shape[-1] == older != words(k, scheme.weights.bits):
            return "words that hold whole codes only (compressed-tensors of before May 2026) are not read"
        return None
