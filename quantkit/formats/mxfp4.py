"""MXFP4 files of gpt-oss, method `mxfp4` of transformers: stacked experts. Read only.

A parameter P [E, K, N] of E experts, which multiply by their part from the right, stores:

    P_blocks  uint8 [E, N, K/32, 16]  FP4 codes, even columns in the low half
    P_scales  uint8 [E, N, K/32]      e, for the scale 2^(e - 127)
    P_bias    [E, N]                  not quantized

As a source, P is called as in a checkpoint that is not quantized and has its axes. To be run, every expert becomes
linears of its own: N of `gate_up_proj` alternates between the outputs of `gate_proj` and of `up_proj`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import ModelError
from quantkit.formats.compressed_tensors_config import CORRUPT
from quantkit.formats.reader import Reader
from quantkit.formats.registry import Shape, register
from quantkit.scheme import PRESETS, Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.weight import QuantizedWeight

JOINT, DENSE = "_", ""
SCHEME = PRESETS["MXFP4A16"]
_BYTES = 16  # of a block of 32 codes
# parameter -> the linears in it, with their outputs
_LINEARS = {
    "gate_up_proj": (("gate_proj", slice(0, None, 2)), ("up_proj", slice(1, None, 2))),
    "down_proj": (("down_proj", slice(None)),),
}


@register
class Mxfp4(Reader):
    """The reader of this format."""

    name = method = "mxfp4"
    scale = "scales"
    joint = JOINT
    leaves: ClassVar[dict[str, torch.dtype | None]] = dict.fromkeys(("blocks", "scales"))

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        return lambda module: SCHEME

    def dimensions(self, tensors: Mapping[str, Any], scheme: Scheme) -> Shape:
        """Of a stack, with the outputs of all experts."""
        experts, k, n = shape("a stack of experts", tensors)
        return experts * n, k

    def linears(
        self, name: str, tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
        experts, _, leaf = name.rpartition(".")
        count, _, _ = shape(name, tensors)
        if leaf not in _LINEARS:
            raise ModelError(f"experts in MXFP4 are {' and '.join(_LINEARS)}, not {leaf}; {CORRUPT}")
        for expert in range(count):
            for linear, rows in _LINEARS[leaf]:
                yield f"{experts}.{expert}.{linear}", {each: t[expert][rows] for each, t in tensors.items()}

    def beside(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        experts, _, leaf = name.removesuffix("_bias").rpartition(".")
        if not experts.endswith("experts") or not name.endswith("_bias") or leaf not in _LINEARS:
            yield name, tensor
            return
        for expert, bias in enumerate(tensor):
            for linear, rows in _LINEARS[leaf]:
                yield f"{experts}.{expert}.{linear}.bias", bias[rows].contiguous()

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """Of one linear, from its blocks [N, K/32, 16] and scales [N, K/32]."""
        import torch

        from quantkit.formats.compressed_tensors import fp4_codes
        from quantkit.numerics.weight import QuantizedWeight

        codes = fp4_codes(tensors["blocks"].flatten(1))  # (N, K)
        scale = tensors["scales"].contiguous().view(torch.float8_e8m0fnu)
        return QuantizedWeight(codes, scale, None, scheme.weights)

    def scale_values(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
        import torch

        return tensors["scales"].view(torch.float8_e8m0fnu).float()


def shape(name: str, stored: Mapping[str, Any]) -> tuple[int, int, int]:
    """[E, K, N] of a parameter, from anything with shapes; ModelError if they do not fit each other."""
    shapes = {leaf: tuple(stored[leaf].shape) for leaf in sorted(Mxfp4.leaves) if leaf in stored}
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

    out, reader = torch.empty(shape(name, tensors), dtype=dtype), Mxfp4()
    for part, blocks, scales in zip(out, tensors["blocks"], tensors["scales"], strict=True):
        part.copy_(reader.unpack({"blocks": blocks, "scales": scales}, SCHEME).dequantize(dtype).T)
    return out
