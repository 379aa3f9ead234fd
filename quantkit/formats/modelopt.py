"""Files of NVIDIA ModelOpt, FP8 and NVFP4. Read only.

FP8    P.weight          float8_e4m3fn [N, K]
       P.weight_scale    fp32 []
       P.input_scale     fp32 []
NVFP4  P.weight          uint8 [N, K/2]            even columns in the low half
       P.weight_scale    float8_e4m3fn [N, K/16]
       P.weight_scale_2  fp32 []                   multiplies: the reciprocal of compressed-tensors' global scale
       P.input_scale     fp32 []                   of FP4 inputs, as before
and of an FP8 cache, in `k_proj` and `v_proj`, `k_scale` and `v_scale`, fp32 [].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import ModelError
from quantkit.formats.compressed_tensors_config import CORRUPT, short
from quantkit.formats.reader import Reader
from quantkit.formats.registry import Shape, register
from quantkit.scheme import NUMBERS, Grid, KVScheme, Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.inputs import InputScale
    from quantkit.numerics.weight import QuantizedWeight

_FP8 = Grid(NUMBERS["fp8_e4m3"], "tensor")
_FP4 = Grid(NUMBERS["fp4_e2m1"], "group", 16, scale="fp8_e4m3")
_SCHEMES = {
    "FP8": Scheme(_FP8, _FP8),
    "NVFP4": Scheme(_FP4, replace(_FP4, dynamic=True)),
    "NVFP4A16": Scheme(_FP4),
}


@register
class ModelOpt(Reader):
    """The reader of this format."""

    name = method = "modelopt"
    scale = "weight_scale"
    positive = frozenset({"weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale"})
    leaves: ClassVar[dict[str, torch.dtype | None]] = dict.fromkeys(
        ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
    )

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        algorithm = config.get("quant_algo")
        scheme = _SCHEMES.get(algorithm) if isinstance(algorithm, str) else None
        size = config.get("group_size")
        if scheme is None or (scheme.weights.two_level and size not in (None, 16)):
            raise ModelError(
                f"ModelOpt's quant_algo {short(algorithm)}, group_size {short(size)} is not read; quantkit reads "
                f"{', '.join(_SCHEMES)}, the last two in groups of 16"
            )
        return lambda module: scheme

    def kv_scheme(self, config: Mapping[str, Any]) -> KVScheme | None:
        said, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
        if said is None and scheme is None:
            return None
        stored = isinstance(scheme, Mapping) and (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
        if not (stored or (scheme is None and said == "FP8")):
            raise ModelError(f"ModelOpt's KV cache {short(said or scheme)} is not read; quantkit reads FP8")
        return KVScheme(_FP8, _FP8)

    def dimensions(self, tensors: Mapping[str, Any], scheme: Scheme) -> Shape:
        self.needs(tensors, "weight", "weight_scale")
        if "pre_quant_scale" in tensors:
            raise ModelError("a linear scales its inputs by pre_quant_scale, which quantkit does not read")
        shape = tuple(tensors["weight"].shape)
        if len(shape) != 2:
            raise ModelError(f"a weight has the shape {list(shape)}; {CORRUPT}")
        return shape[0], shape[1] * (2 if scheme.weights.two_level else 1)

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        import torch

        from quantkit.formats.compressed_tensors import fp4_codes
        from quantkit.numerics.weight import QuantizedWeight

        (n, k), grid = self.dimensions(tensors, scheme), scheme.weights
        stored, scale = tensors["weight"], tensors["weight_scale"]
        kind, count = (torch.uint8, n * k // 16) if grid.two_level else (torch.float8_e4m3fn, 1)
        if stored.dtype != kind or scale.numel() != count or not grid.divides(k):
            raise ModelError(
                f"a weight {stored.dtype} {list(stored.shape)} with scales {list(scale.shape)} is no {scheme}; "
                f"{CORRUPT}"
            )
        if not grid.two_level:
            return QuantizedWeight(
                stored.view(torch.uint8), scale.float().view(1, 1).expand(n, 1), None, grid
            )
        self.needs(tensors, "weight_scale_2")
        whole = tensors["weight_scale_2"].float().reciprocal().view(1)
        return QuantizedWeight(fp4_codes(stored), scale, None, grid, global_scale=whole)

    def inputs_of(self, tensors: Mapping[str, torch.Tensor]) -> InputScale | None:
        from quantkit.numerics.inputs import InputScale

        scale = tensors.get("input_scale")
        if scale is None:
            return None
        whole = scale.float().view(1)
        return InputScale(whole.reciprocal() if "weight_scale_2" in tensors else whole)
