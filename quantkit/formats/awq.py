"""AWQ files of AutoAWQ, version "GEMM", 4 bits. Read only.

A linear P with weight [N, K] and groups of G columns stores:

    P.qweight  int32 [K, N/8]    codes, eight output channels a word
    P.qzeros   int32 [K/G, N/8]  zero points, packed alike
    P.scales   fp16 [K/G, N]

Channel 8 w + t of a word lies in its nibble [0, 4, 1, 5, 2, 6, 3, 7][t]. w[n, k] = scales (q - z).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import ModelError
from quantkit.formats.compressed_tensors_config import CORRUPT, short
from quantkit.formats.reader import Reader, integers
from quantkit.formats.registry import Shape, register
from quantkit.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.weight import QuantizedWeight

_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


@register
class Awq(Reader):
    """The reader of this format."""

    name = method = "awq"
    scale = "scales"
    leaves: ClassVar[dict[str, torch.dtype | None]] = dict.fromkeys(("qweight", "qzeros", "scales"))

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        version, zeros = str(config.get("version", "gemm")).lower(), config.get("zero_point", True)
        if version != "gemm" or zeros is not True:
            raise ModelError(
                f"AWQ version {short(config.get('version'))}, zero_point {short(zeros)} is not read; quantkit reads "
                "version 'gemm' with zero points"
            )
        settings = {
            "bits": config.get("bits", config.get("w_bit")),
            "group_size": config.get("group_size", config.get("q_group_size", 128)),
        }
        scheme = integers("AWQ", settings, (4,), symmetric=False)
        return lambda module: scheme

    def dimensions(self, tensors: Mapping[str, Any], scheme: Scheme) -> Shape:
        self.needs(tensors, "qweight", "qzeros", "scales")
        shape = tuple(tensors["qweight"].shape)
        if len(shape) != 2 or not scheme.weights.divides(shape[0]):
            raise ModelError(f"qweight is {list(shape)}, no shape of a {scheme} weight; {CORRUPT}")
        k, n = shape[0], 8 * shape[1]
        groups = k // scheme.weights.group(k)
        wanted = {"qzeros": (groups, shape[1]), "scales": (groups, n)}
        found = {leaf: tuple(tensors[leaf].shape) for leaf in wanted}
        if found != wanted:
            raise ModelError(f"qweight {list(shape)} of {scheme} goes with {wanted}, got {found}; {CORRUPT}")
        return n, k

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        from quantkit.numerics.weight import QuantizedWeight

        self.dimensions(tensors, scheme)
        codes, zero = (_channels(tensors[leaf]).T.contiguous() for leaf in ("qweight", "qzeros"))
        return QuantizedWeight(codes, tensors["scales"].T.contiguous(), zero, scheme.weights)


def _channels(words: torch.Tensor) -> torch.Tensor:
    """Words [rows, N/8] -> codes uint8 [rows, N]."""
    import torch

    shifts = torch.tensor([4 * nibble for nibble in _NIBBLES], dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & 15).to(torch.uint8).flatten(1)
