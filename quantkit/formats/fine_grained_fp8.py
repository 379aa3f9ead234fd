"""FP8 files of transformers' `fp8` method (DeepSeek, Qwen FP8 and others). Read only.

A linear P with weight [N, K] stores, in blocks of B x B:

    P.weight            float8_e4m3fn [N, K]
    P.weight_scale_inv  fp32 [ceil(N/B), ceil(K/B)]; a multiplier in spite of its name
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import ModelError
from quantkit.formats.compressed_tensors_config import CORRUPT, short
from quantkit.formats.reader import Reader
from quantkit.formats.registry import Shape, register
from quantkit.scheme import NUMBERS, Grid, Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.weight import QuantizedWeight

_FP8 = NUMBERS["fp8_e4m3"]


@register
class FineGrainedFp8(Reader):
    """The reader of this format."""

    name = method = "fp8"
    scale = "weight_scale_inv"
    positive = frozenset({"weight_scale_inv"})
    leaves: ClassVar[dict[str, torch.dtype | None]] = dict.fromkeys(("weight", "weight_scale_inv"))

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        block, inputs = config.get("weight_block_size"), config.get("activation_scheme", "dynamic")
        square = isinstance(block, list | tuple) and len(block) == 2 and block[0] == block[1]
        size = block[0] if isinstance(block, list | tuple) and square else None
        if type(size) is not int or size < 1 or inputs != "dynamic" or config.get("fmt", "e4m3") != "e4m3":
            raise ModelError(
                f"FP8 with weight_block_size {short(block)}, activation_scheme {short(inputs)}, fmt "
                f"{short(config.get('fmt'))} is not read; quantkit reads e4m3 in square blocks with dynamic activations"
            )
        scheme = Scheme(Grid(_FP8, "block", size), Grid(_FP8, "group", size, dynamic=True))
        return lambda module: scheme

    def dimensions(self, tensors: Mapping[str, Any], scheme: Scheme) -> Shape:
        self.needs(tensors, "weight", "weight_scale_inv")
        shape, scales = (tuple(tensors[leaf].shape) for leaf in ("weight", "weight_scale_inv"))
        size = scheme.weights.group_size or 1
        if len(shape) != 2 or scales != tuple(-(-side // size) for side in shape):
            raise ModelError(
                f"a weight {list(shape)} in blocks of {size} does not go with {list(scales)} scales; {CORRUPT}"
            )
        return shape[0], shape[1]

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The last rows and columns may fill a part of their block only; such columns are grouped more finely."""
        import torch

        from quantkit.numerics.weight import QuantizedWeight

        (n, k), grid = self.dimensions(tensors, scheme), scheme.weights
        if tensors["weight"].dtype != torch.float8_e4m3fn:
            raise ModelError(f"a weight is {tensors['weight'].dtype}, not FP8 E4M3; {CORRUPT}")
        assert grid.group_size is not None
        scale = tensors["weight_scale_inv"].float().repeat_interleave(grid.group_size, 0)[:n]
        if k % grid.group_size:
            fine = math.gcd(k, grid.group_size)
            scale = scale.repeat_interleave(grid.group_size // fine, 1)[:, : k // fine].contiguous()
            grid = Grid(_FP8, "group", fine)
        return QuantizedWeight(tensors["weight"].view(torch.uint8), scale, None, grid)
