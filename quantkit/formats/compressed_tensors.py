"""compressed-tensors, the format that vLLM, SGLang and transformers load: the tensors of a linear.

A linear P with weight [N, K] and K/G groups per row stores, by the format of its config group (channel: one group per
row; scales in the dtype of the model unless said otherwise):

pack-quantized       P.weight_packed  int32 [N, ceil(K bits / 32)]   unsigned codes, dense, lowest bits first
(integer weights)    P.weight_scale   [N, K/G]
                     P.weight_shape   int64 [2] = (N, K)
                     P.weight_zero_point  int32 [ceil(N bits / 32), K/G]   asymmetric only; the same packing along N
                     P.weight_g_idx   int32 [K]       older files with actorder "group": the group of every column
int-quantized        P.weight         int8 [N, K]     one code a byte, from -2^(bits-1)
(inputs rounded too) P.weight_scale   [N, K/G]; [1] for the whole tensor
float-quantized      P.weight         float8_e4m3fn [N, K]
                     P.weight_scale   [N, 1]; [1]; or [ceil(N/B), K/B] for blocks of B x B
nvfp4-pack-quantized P.weight_packed  uint8 [N, K/2]          even columns in the low half
                     P.weight_scale   float8_e4m3fn [N, K/16]
                     P.weight_global_scale  float32 [1]       w = fp4 * weight_scale / weight_global_scale
mxfp4-pack-quantized P.weight_packed  uint8 [N, K/2]
                     P.weight_scale   uint8 [N, K/32]         e, for the scale 2^(e - 127)
mxfp8-quantized      P.weight         float8_e4m3fn [N, K]
                     P.weight_scale   uint8 [N, K/32]
and for inputs with a calibrated scale:
                     P.input_scale    [1]
                     P.input_zero_point  int8 [1]             asymmetric only
or for NVFP4 inputs: P.input_global_scale  float32 [1]        as of weights; scales of groups are those of the values

pack-quantized counts codes from -2^(bits-1) and adds 2^(bits-1) when it packs them: the words hold our unsigned codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from quantkit_kernels import Spec, Stored, pack_bits, unpack_bits, words

from quantkit.errors import ModelError
from quantkit.formats import compressed_tensors_config as configs
from quantkit.formats.compressed_tensors_config import (
    CORRUPT,
    FLOAT,
    INT,
    MXFP4,
    MXFP8,
    NVFP4,
    PACKED,
    format_of,
)
from quantkit.formats.registry import Codec, Shape, register
from quantkit.numerics.inputs import InputScale
from quantkit.numerics.weight import QuantizedWeight, sorted_by_group
from quantkit.scheme import Grid, KVScheme, Scheme

Shapes = dict[str, tuple[int, ...]]
ORDER = "weight_g_idx"
_CODES = {
    PACKED: torch.int32,
    INT: torch.int8,
    FLOAT: torch.float8_e4m3fn,
    NVFP4: torch.uint8,
    MXFP4: torch.uint8,
    MXFP8: torch.float8_e4m3fn,
}
_SCALES = {NVFP4: torch.float8_e4m3fn, MXFP4: torch.uint8, MXFP8: torch.uint8}
_BYTES = (INT, FLOAT, MXFP8)  # formats that store one code a byte


@register
class CompressedTensors(Codec):
    """The codec of this format."""

    name = "compressed-tensors"
    method = configs.METHOD
    leaves: ClassVar[dict[str, torch.dtype | None]] = {
        "weight": None,
        "weight_packed": None,
        "weight_scale": None,
        "weight_shape": torch.int64,
        "weight_zero_point": torch.int32,
        "weight_global_scale": torch.float32,
        ORDER: torch.int32,
        "input_scale": None,
        "input_zero_point": torch.int8,
        "input_global_scale": torch.float32,
    }
    scale = "weight_scale"
    order = ORDER
    apart = frozenset({"weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", ORDER})
    positive = frozenset(
        {"weight_scale", "weight_global_scale", "input_scale", "input_global_scale", "k_scale", "v_scale"}
    )

    def kind(self, scheme: Scheme) -> str:
        """The format of the config group that stores a scheme. ModelError if there is none."""
        return format_of(scheme)

    def dtypes(self, scheme: Scheme) -> dict[str, torch.dtype | None]:
        kind = self.kind(scheme)
        return self.leaves | {
            "weight": _CODES[kind],
            "weight_packed": _CODES[kind],
            "weight_scale": _SCALES.get(kind),
        }

    def shapes(self, n: int, k: int, scheme: Scheme) -> Shapes:
        kind, grid = self.kind(scheme), scheme.weights
        groups = k // grid.group(k)
        if kind == PACKED:
            shapes: Shapes = {
                "weight_packed": (n, words(k, grid.bits)),
                "weight_scale": (n, groups),
                "weight_shape": (2,),
            }
            if not grid.symmetric:
                shapes["weight_zero_point"] = (words(n, grid.bits), groups)
        elif kind in _BYTES:
            shapes = {"weight": (n, k), "weight_scale": _scale_shape(n, k, grid)}
        else:
            shapes = {"weight_packed": (n, k // 2), "weight_scale": (n, groups)}
        if grid.two_level:
            shapes["weight_global_scale"] = (1,)
        if scheme.inputs is not None and scheme.inputs.two_level:
            shapes["input_global_scale"] = (1,)
        elif scheme.inputs is not None and not scheme.inputs.dynamic:
            shapes["input_scale"] = (1,)
            if not scheme.inputs.symmetric:
                shapes["input_zero_point"] = (1,)
        return shapes

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        return self.pack_scheme(weight, Scheme(weight.grid))

    def pack_scheme(
        self, weight: QuantizedWeight, scheme: Scheme, inputs: InputScale | None = None
    ) -> dict[str, torch.Tensor]:
        grid = weight.grid
        kind = self.kind(scheme)
        scale = weight.scale.contiguous()
        if kind == PACKED:
            codes = weight.codes if weight.order is None else weight.codes[:, weight.order.argsort()]
            tensors = {
                "weight_packed": pack_bits(codes.contiguous(), grid.bits),
                "weight_scale": scale,
                "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
            }
            if weight.zero is not None:
                tensors["weight_zero_point"] = pack_bits(weight.zero.T.contiguous(), grid.bits).T.contiguous()
        elif kind == INT:
            codes = (weight.codes.to(torch.int16) - grid.midpoint).to(torch.int8)
            tensors = {"weight": codes, "weight_scale": _narrowed(scale, grid)}
        elif kind in (FLOAT, MXFP8):
            tensors = {
                "weight": weight.codes.contiguous().view(torch.float8_e4m3fn),
                "weight_scale": scale.view(torch.uint8) if kind == MXFP8 else _narrowed(scale, grid),
            }
        else:
            halves = weight.codes.view(len(weight.codes), -1, 2)  # (N, K/2, 2)
            tensors = {"weight_packed": halves[..., 0] | (halves[..., 1] << 4)}
            tensors["weight_scale"] = scale if kind == NVFP4 else scale.view(torch.uint8)
        if weight.global_scale is not None:
            tensors["weight_global_scale"] = weight.global_scale
        if weight.order is not None:
            if kind != PACKED:
                raise ModelError(
                    f"columns out of order are stored for packed integers only, not for {scheme}"
                )
            groups = torch.arange(scale.shape[1], dtype=torch.int32)
            sorted_groups = groups.repeat_interleave(len(weight.order) // scale.shape[1])
            tensors[ORDER] = sorted_groups[weight.order.argsort()]
        return tensors | _packed_inputs(inputs, scheme.inputs)

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        grid, kind = scheme.weights, self.kind(scheme)
        n, k = self.dimensions(tensors, scheme)
        if self.older(tensors, scheme):
            tensors = _densely_packed(tensors, n, k, grid)
        shapes = self.shapes(n, k, scheme)
        if kind == PACKED and ORDER in tensors:
            shapes[ORDER] = (k,)
        if tensors.keys() != shapes.keys():
            raise ModelError(f"a {scheme} linear has the tensors {sorted(shapes)}, got {sorted(tensors)}")
        for leaf, shape in shapes.items():
            if tuple(tensors[leaf].shape) != shape:
                raise ModelError(
                    f"{leaf} of a {scheme} [{n}, {k}] linear is {shape}, got {tuple(tensors[leaf].shape)}"
                )
        zero = tensors.get("weight_zero_point")
        scale = tensors["weight_scale"]
        if kind == PACKED:
            codes = unpack_bits(tensors["weight_packed"], grid.bits, k).contiguous()
        elif kind == INT:
            codes = (tensors["weight"].to(torch.int16) + grid.midpoint).to(torch.uint8)
        elif kind in (FLOAT, MXFP8):
            codes = tensors["weight"].view(torch.uint8)
        else:
            codes = fp4_codes(tensors["weight_packed"])
        if grid.scale == "e8m0":
            scale = scale.view(torch.float8_e8m0fnu)
        weight = QuantizedWeight(
            codes=codes,
            scale=_widened(scale, n, k, grid),
            zero=None if zero is None else unpack_bits(zero.T, grid.bits, n).T.contiguous(),
            grid=grid,
            global_scale=tensors.get("weight_global_scale"),
        )
        return sorted_by_group(weight, tensors[ORDER]) if ORDER in tensors else weight

    def codes_leaf(self, scheme: Scheme) -> str:
        return "weight" if self.kind(scheme) in _BYTES else "weight_packed"

    def joined(
        self, leaf: str, parts: Sequence[torch.Tensor], shape: Shape, global_scale: torch.Tensor | None
    ) -> torch.Tensor:
        if leaf == "weight_shape":
            return torch.tensor(shape, dtype=torch.int64)
        if leaf == "weight_global_scale":
            assert global_scale is not None
            return global_scale
        return torch.cat(list(parts))

    def scale_values(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
        scale = tensors["weight_scale"]
        if scheme.weights.scale == "e8m0":
            return scale.view(torch.float8_e8m0fnu).float()
        whole = tensors["weight_global_scale"] if scheme.weights.two_level else 1.0
        return scale.float() / whole

    def inputs_of(self, tensors: Mapping[str, torch.Tensor]) -> InputScale | None:
        scale = tensors.get("input_scale", tensors.get("input_global_scale"))
        return None if scale is None else InputScale(scale, tensors.get("input_zero_point"))

    def stored(self, tensors: Mapping[str, torch.Tensor], spec: Spec, scheme: Scheme) -> Stored:
        """The very same tensors where they are packed as kernels take them."""
        if self.kind(scheme) != PACKED or ORDER in tensors:
            return super().stored(tensors, spec, scheme)
        zero = tensors.get("weight_zero_point")
        return Stored(tensors["weight_packed"], tensors["weight_scale"], zero, spec)

    def narrowed(self, weight: QuantizedWeight, apart: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        if weight.grid.scale == "e8m0":
            return replace(weight, scale=weight.scale.to(torch.float8_e8m0fnu))
        if weight.grid.two_level:
            whole = apart["weight_global_scale"]
            scale = (weight.scale * whole).to(
                torch.float8_e4m3fn
            )  # the product is one rounding away from the code
            return replace(weight, scale=scale, global_scale=whole)
        return weight

    def dimensions(self, tensors: Mapping[str, Any], scheme: Scheme) -> Shape:
        kind, grid = self.kind(scheme), scheme.weights
        codes = "weight_shape" if kind == PACKED else self.codes_leaf(scheme)
        if codes not in tensors or "weight_scale" not in tensors:
            raise ModelError(
                f"a {scheme} linear lacks its {codes} or weight_scale, got {sorted(tensors)}; {CORRUPT}"
            )
        said = tensors[codes]
        if kind == PACKED:
            sizes = said.tolist() if tuple(said.shape) == (2,) else None
            shown = sizes or f"{list(said.shape)} values"
        else:
            shown = list(said.shape)
            packed = 1 if kind in _BYTES else 2
            sizes = [shown[0], packed * shown[1]] if len(shown) == 2 else None
        if (
            sizes is None
            or not all(type(each) is int and each > 0 for each in sizes)
            or not grid.divides(sizes[1])
        ):
            raise ModelError(f"{codes} is {shown}, no shape of a {scheme} weight")
        n, k = sizes
        scales = tuple(tensors["weight_scale"].shape)
        if scales != self.shapes(n, k, scheme)["weight_scale"]:
            raise ModelError(
                f"{codes} says {sizes}, which does not fit {list(scales)} scales of a {scheme} weight; {CORRUPT}"
            )
        return n, k

    def config(
        self, schemes: Mapping[str, Scheme], ignore: Sequence[str], kv: KVScheme | None = None
    ) -> dict[str, Any]:
        return configs.written_config(schemes, ignore, kv)

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        return configs.parsed_config(config)

    def kv_scheme(self, config: Mapping[str, Any]) -> KVScheme | None:
        return configs.kv_scheme(config)

    def cut(
        self, leaf: str, tensor: torch.Tensor, scheme: Scheme, sizes: Sequence[int], rows: Sequence[int]
    ) -> list[torch.Tensor] | None:
        if leaf == "weight_shape":
            return [torch.tensor([n, int(tensor[1])], dtype=tensor.dtype) for n in sizes]
        if leaf == ORDER or tensor.numel() == 1:
            return [tensor.clone() for _ in sizes]
        if tensor.dim() and tensor.shape[0] == sum(rows):
            return [part.contiguous() for part in tensor.split(list(rows))]
        return (
            _zero_points_of_rows(tensor, scheme.weights.bits, sizes) if leaf == "weight_zero_point" else None
        )

    def older(self, tensors: Mapping[str, Any], scheme: Scheme) -> bool:
        """Words that hold whole codes only, of compressed-tensors before May 2026."""
        bits = scheme.weights.bits
        if self.kind(scheme) != PACKED or 32 % bits == 0 or "weight_packed" not in tensors:
            return False
        n, k = self.dimensions(tensors, scheme)
        return tuple(tensors["weight_packed"].shape) == (n, -(-k // (32 // bits))) != (n, words(k, bits))


def _densely_packed(
    tensors: Mapping[str, torch.Tensor], n: int, k: int, grid: Grid
) -> dict[str, torch.Tensor]:
    """The tensors of a linear [N, K] with dense words in place of those that hold whole codes."""
    found = dict(tensors)
    codes = _whole_codes(tensors["weight_packed"], grid.bits)[:, :k]
    found["weight_packed"] = pack_bits(codes.contiguous(), grid.bits)
    if "weight_zero_point" in tensors:
        zero = _whole_codes(tensors["weight_zero_point"].T, grid.bits)[:, :n]
        found["weight_zero_point"] = pack_bits(zero.contiguous(), grid.bits).T.contiguous()
    return found


def _whole_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [rows, M] from int32 words [rows, M / floor(32/b)], lowest bits first."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    return ((packed[:, :, None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)


def _scale_shape(n: int, k: int, grid: Grid) -> tuple[int, ...]:
    """The shape of the stored scales of a weight [N, K]."""
    if grid.granularity == "tensor":
        return (1,)
    rows = grid.group_size if grid.granularity == "block" and grid.group_size else 1
    return -(-n // rows), k // grid.group(k)


def _narrowed(scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Scales [N, K/G] without the repetitions of rows that share one."""
    if grid.granularity == "tensor":
        return scale[0].contiguous()
    if grid.granularity == "block":
        return scale[:: grid.group_size].contiguous()
    return scale


def _widened(scale: torch.Tensor, n: int, k: int, grid: Grid) -> torch.Tensor:
    """The inverse of `_narrowed`: [N, K/G], views where rows share a scale."""
    if grid.granularity == "tensor":
        return scale.view(1, 1).expand(n, 1)
    if grid.granularity == "block":
        assert grid.group_size is not None
        return scale.repeat_interleave(grid.group_size, 0)[:n]
    return scale


def fp4_codes(pairs: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [N, K] from bytes [N, K/2] that hold two each, even columns in the low half."""
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


def _packed_inputs(inputs: InputScale | None, grid: Grid | None) -> dict[str, torch.Tensor]:
    if inputs is None:
        return {}
    if grid is not None and grid.two_level:
        return {"input_global_scale": inputs.scale}
    tensors = {"input_scale": inputs.scale}
    return tensors if inputs.zero is None else tensors | {"input_zero_point": inputs.zero}


def _zero_points_of_rows(packed: torch.Tensor, bits: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Packed zero points [ceil(N bits / 32), K/G] of N rows, cut into those of `sizes` rows each."""
    codes = unpack_bits(packed.T, bits, sum(sizes)).T  # (N, K/G)
    return [pack_bits(part.T.contiguous(), bits).T.contiguous() for part in codes.split(sizes)]
