"""A quantized KV cache in memory of a fixed size: what a captured decode step writes and attends to.

A step writes its entry by the op `quantkit::kv_write` and attends by `quantkit::kv_decode`. Both read their places from
memory, so that a recorded step can be repeated at another place. Codes are int8 or FP8 E4M3 [1, H, length, d]; scales
fp32, [1, H, length] of int8, [1, H, 1] stored ones of FP8. INT8 keys may be rotated.
"""

from __future__ import annotations

import torch
from quantkit_kernels.triton.kv_op import kv_decode, kv_write

from quantkit.errors import ModelError
from quantkit.numerics.hadamard import hadamard
from quantkit.numerics.kv import KVScales
from quantkit.scheme import KVScheme

CODES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
MOST_CHANNELS = 256  # of a head, as the kernels take it


def refuses(scheme: KVScheme) -> str | None:
    """Why a cache cannot be held this way, or None."""
    grid = scheme.keys
    if scheme.sinks or scheme.residual:
        part = "first" if scheme.sinks else "newest"
        return f"its KV cache keeps the {part} tokens exact, which captured graphs do not"
    tokens = grid.dynamic and grid.number.name == "int8" and grid.granularity == "token"
    stored = not grid.dynamic and grid.number.name == "fp8_e4m3"
    fits = grid.symmetric and not grid.group_size and grid == scheme.values
    if not (fits and (tokens or stored)):
        return f"its KV cache is {scheme}; captured graphs hold INT8 per token and head, and FP8"
    return None


class Seen:
    """The places that a step sees, found once for all layers that have the same mask."""

    def __init__(self) -> None:
        self._known: list[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]] = []

    def forget(self) -> None:
        """Masks of another step follow."""
        self._known.clear()

    def of(self, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(first, end), int32 [1] each, of a bool mask [1, 1, 1, S] whose places seen are one range."""
        for known, found in self._known:
            if known is mask:
                return found
        if mask is None or mask.dtype != torch.bool or mask.shape[:3] != (1, 1, 1):
            got = "none" if mask is None else f"{mask.dtype} {list(mask.shape)}"
            raise ModelError(f"a captured step over a quantized KV cache needs a mask of places, got {got}")
        seen = mask.view(1, -1).to(torch.int32)
        first = seen.argmax(1).to(torch.int32)
        places = first, first + seen.sum(1, dtype=torch.int32)
        self._known.append((mask, places))
        return places


class KVBuffer:
    """Keys and values of one layer and sequence; also what goes to `kv_attention.attention` in their place."""

    def __init__(
        self, scheme: KVScheme, scales: KVScales | None, like: torch.Tensor, length: int, seen: Seen
    ) -> None:
        """like: keys [1, H, T, d]. scales: of a scheme with stored ones."""
        _, heads, _, d = like.shape
        self.rotate, self.stored, self.seen = scheme.rotate, scales is not None, seen
        dtype = CODES[scheme.keys.number.name]
        self.keys, self.values = (
            like.new_zeros(1, heads, length, d, dtype=torch.uint8).view(dtype) for _ in range(2)
        )
        if scales is None:
            shape = 1, heads, length
            self.scales = tuple(like.new_zeros(shape, dtype=torch.float32) for _ in range(2))
        else:
            self.scales = tuple(
                each.to(like.device, torch.float32).reshape(1, -1, 1).expand(1, heads, 1).contiguous()
                for each in (scales.keys, scales.values)
            )

    def write(self, keys: torch.Tensor, values: torch.Tensor, place: torch.Tensor) -> None:
        """Put the entries of T tokens, [1, H, T, d] each, at `place`, int [], and behind it."""
        if self.rotate:
            keys, values = hadamard(keys.float()), values.float()
        begin = place.to(torch.int32).view(1)
        kv_write(keys, values, self.keys, self.values, *self.scales, begin, self.stored)

    def attend(
        self, query: torch.Tensor, mask: torch.Tensor | None, factor: float, softcap: float
    ) -> torch.Tensor:
        """Attention of query [1, heads, 1, d] to the places that the mask shows, [1, 1, heads, d]."""
        first, end = self.seen.of(mask)
        q = (hadamard(query) if self.rotate else query)[:, :, 0].contiguous()
        k_scales, v_scales = self.scales
        out = kv_decode(q, self.keys, k_scales, self.values, v_scales, first, end, factor, softcap)
        return out[:, None]
