"""GPTQ files of GPTQModel, AutoGPTQ and AutoRound: v1, v2, with and without an order of columns. Read only.

A linear P with weight [N, K] stores, with b bits and groups of G columns:

    P.qweight  int32 [K b / 32, N]    codes, packed along K, lowest bits first
    P.qzeros   int32 [K/G, N b / 32]  zero points, packed along N; v1 stores z - 1, v2 stores z
    P.scales   fp16 [K/G, N]
    P.g_idx    int32 [K]              the group of every column; left out by some tools

    w[n, k] = scales[g_idx[k], n] (q[k, n] - z[g_idx[k], n])

With `desc_act` a group's columns are spread over the row. The order is kept beside the codes, and the layer gathers its
input once (`QuantizedWeight.order`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import ModelError
from quantkit.formats.compressed_tensors_config import CORRUPT, short
from quantkit.formats.reader import Reader, by_name, integers, overridden
from quantkit.formats.registry import Codec, Shape, register
from quantkit.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.weight import QuantizedWeight

BITS = (2, 3, 4, 8)
_VERSIONS = {"gptq": 1, "gptq_v2": 0}  # format -> what its stored zero points lack


@register
class Gptq(Reader):
    """The reader of this format. lacks: what is added to every stored zero point."""

    name = method = "gptq"
    scale = "scales"
    leaves: ClassVar[dict[str, torch.dtype | None]] = dict.fromkeys(("qweight", "qzeros", "scales", "g_idx"))

    def __init__(self, lacks: int = 1) -> None:
        self.lacks = lacks

    def of(self, config: Mapping[str, Any]) -> Codec:
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in _VERSIONS or config.get("pack_dtype", "int32") != "int32":
            raise ModelError(
                f"GPTQ format {short(version)}, pack_dtype {short(config.get('pack_dtype'))} is not read; quantkit "
                f"reads {', '.join(_VERSIONS)} in int32"
            )
        return type(self)(_VERSIONS[version])

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise ModelError(
                f"quantization_config: dynamic must be an object, got {short(dynamic)}; {CORRUPT}"
            )

        def scheme_of(module: str) -> Scheme | None:
            own = overridden(config, dynamic, module)
            return None if own is None else integers("GPTQ", own, BITS, bool(own.get("sym", True)))

        scheme_of("")
        return by_name(scheme_of)

    def dimensions(self, tensors: Mapping[str, Any], scheme: Scheme) -> Shape:
        self.needs(tensors, "qweight", "qzeros", "scales")
        rows, n = _matrix("qweight", tensors["qweight"])
        bits = scheme.weights.bits
        k = rows * 32 // bits
        groups, columns = k // max(1, scheme.weights.group(k)), n * bits // 32
        wanted = {"qzeros": (groups, columns), "scales": (groups, n)}
        found = {leaf: tuple(tensors[leaf].shape) for leaf in wanted}
        if found != wanted or not scheme.weights.divides(k) or rows * 32 % bits:
            raise ModelError(
                f"qweight [{rows}, {n}] of {scheme} goes with {wanted}, got {found}; {CORRUPT}, or its bits or group "
                "size are overridden by something that quantkit does not read"
            )
        return n, k

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        from quantkit_kernels import unpack_bits

        from quantkit.numerics.weight import QuantizedWeight, sorted_by_group

        (n, k), grid = self.dimensions(tensors, scheme), scheme.weights
        codes = unpack_bits(tensors["qweight"].T.contiguous(), grid.bits, k)
        zero = unpack_bits(tensors["qzeros"].contiguous(), grid.bits, n) + self.lacks
        zero = (zero & grid.qmax).T.contiguous()  # (N, K/G); a stored 2^b - 1 stands for 0 in v1
        if grid.symmetric and not bool((zero == grid.midpoint).all()):
            raise ModelError(
                f"a symmetric linear has zero points other than {grid.midpoint}; checkpoint_format in its config is "
                "wrong, or the file is corrupt"
            )
        scale = tensors["scales"].T.contiguous()
        weight = QuantizedWeight(codes.contiguous(), scale, None if grid.symmetric else zero, grid)
        return sorted_by_group(weight, tensors["g_idx"]) if "g_idx" in tensors else weight


def _matrix(leaf: str, tensor: Any) -> Shape:
    if len(tensor.shape) != 2:
        raise ModelError(f"{leaf} has the shape {list(tensor.shape)}, not two dimensions; {CORRUPT}")
    return int(tensor.shape[0]), int(tensor.shape[1])
