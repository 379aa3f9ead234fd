"""FP8 files of transformers' `fp8` method (DeepSeek, Qwen, Mistral and others). Read only.

A linear P with weight [N, K] stores, in blocks of B x B, or with one scale (`weight_block_size: null`):

    P.weight            float8_e4m3fn [N, K]
    P.weight_scale_inv  fp32, or E8M0 [ceil(N/B), ceil(K/B)]; one value; a multiplier in spite of its name
    P.activation_scale  fp32, one value: of inputs with a stored range (`activation_scheme: static`), beside one scale
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import ModelError
from quantkit.formats.compressed_tensors_config import CORRUPT, short
from quantkit.formats.reader import Reader
from quantkit.formats.registry import Shape, register
from quantkit.scheme import FP8_TOKEN, NUMBERS, Grid, Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.inputs import InputScale
    from quantkit.numerics.weight import QuantizedWeight

_FP8 = NUMBERS["fp8_e4m3"]
_TENSOR = Grid(_FP8, "tensor")
# activation_scheme -> the scheme of weights with one scale
_WHOLE = {"dynamic": Scheme(_TENSOR, FP8_TOKEN), "static": Scheme(_TENSOR, _TENSOR)}


@register
class FineGrainedFp8(Reader):
    """The reader of this format."""

    name = method = "fp8"
    scale = "weight_scale_inv"
    positive = frozenset({"weight_scale_inv", "activation_scale"})
    leaves: ClassVar[dict[str, torch.dtype | None]] = dict.fromkeys(
        ("weight", "weight_scale_inv", "activation_scale")
    )

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        block, inputs = config.get("weight_block_size"), config.get("activation_scheme", "dynamic")
        scheme = None
        if block is None:
            scheme = _WHOLE.get(str(inputs))
        elif isinstance(block, list | tuple) and len(block) == 2 and inputs == "dynamic":
            size = block[0] if block[0] == block[1] else None
            if type(size) is int and size >= 1:
                scheme = Scheme(Grid(_FP8, "block", size), Grid(_FP8, "group", size, dynamic=True))
        if (
            scheme is None
            or config.get("fmt", "e4m3") != "e4m3"
            or config.get("expert_dtype", "fp8") != "fp8"
        ):
            raise ModelError(
                f"FP8 with weight_block_size {short(block)}, activation_scheme {short(inputs)}, fmt "
                f"{short(config.get('fmt'))}, expert_dtype {short(config.get('expert_dtype'))} is not read; quantkit "
                "reads e4m3 in square blocks with dynamic activations, or with one scale for a weight"
            )
        return lambda module: scheme

    def dimensions(self, tensors: Mapping[str, Any], scheme: Scheme) -> Shape:
        self.needs(tensors, "weight", "weight_scale_inv")
        shape, scales = (tuple(tensors[leaf].shape) for leaf in ("weight", "weight_scale_inv"))
        size = scheme.weights.group_size
        fits = math.prod(scales) == 1 if size is None else scales == tuple(-(-side // size) for side in shape)
        if len(shape) != 2 or not fits:
            raise ModelError(
                f"a weight {list(shape)} {f'in blocks of {size}' if size else 'with one scale'} does not go with "
                f"{list(scales)} scales; {CORRUPT}"
            )
        return shape[0], shape[1]

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The last rows and columns may fill a part of their block only; such columns are grouped more finely."""
        import torch

        from quantkit.numerics.weight import QuantizedWeight

        (n, k), grid = self.dimensions(tensors, scheme), scheme.weights
        if tensors["weight"].dtype != torch.float8_e4m3fn:
            raise ModelError(f"a weight is {tensors['weight'].dtype}, not FP8 E4M3; {CORRUPT}")
        scale = tensors["weight_scale_inv"].float()
        if grid.group_size is None:
            return QuantizedWeight(
                tensors["weight"].view(torch.uint8), scale.view(1, 1).expand(n, 1), None, grid
            )
        scale = scale.repeat_interleave(grid.group_size, 0)[:n]
        if k % grid.group_size:
            fine = math.gcd(k, grid.group_size)
            scale = scale.repeat_interleave(grid.group_size // fine, 1)[:, : k // fine].contiguous()
            grid = Grid(_FP8, "group", fine)
        return QuantizedWeight(tensors["weight"].view(torch.uint8), scale, None, grid)

    def inputs_of(self, tensors: Mapping[str, torch.Tensor]) -> InputScale | None:
        from quantkit.numerics.inputs import InputScale

        scale = tensors.get("activation_scale")
        return None if scale is None else InputScale(scale.float().view(1))
