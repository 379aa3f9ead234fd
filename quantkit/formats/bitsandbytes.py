"""Files of bitsandbytes: NF4 in blocks of a row, and int8. Read only.

4 bits  P.weight                                    uint8 [N K / 2, 1]      the first of two codes in the high half
        P.weight.absmax                             fp32 [N K / B]          one scale for B codes
        P.weight.quant_map                          fp32 [16]               what a code stands for
        P.weight.quant_state.bitsandbytes__nf4      uint8, JSON             quant_type, blocksize, dtype, shape
        and if the scales are quantized themselves: absmax uint8, P.weight.nested_absmax, P.weight.nested_quant_map
8 bits  P.weight  int8 [N, K];  P.SCB  fp32 [N]     w = q SCB / 127

Runs of B codes go over the ends of rows unless B divides K; such files are not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import ModelError
from quantkit.formats.compressed_tensors_config import CORRUPT, short
from quantkit.formats.reader import Reader
from quantkit.formats.registry import Shape, register
from quantkit.scheme import NUMBERS, Grid, Scheme, integer

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.weight import QuantizedWeight

_STATE = "weight.quant_state.bitsandbytes__nf4"
_NF4 = NUMBERS["nf4"]


@register
class BitsAndBytes(Reader):
    """The reader of this format."""

    name = method = "bitsandbytes"
    scale = "SCB"
    leaves: ClassVar[dict[str, torch.dtype | None]] = dict.fromkeys(
        ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", _STATE,
         "weight.quant_state.bitsandbytes__fp4", "SCB", "weight_format")
    )  # fmt: skip

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        """The block size of NF4 is in the tensors, so that of the scheme is the usual 64 (see `unpack`)."""
        if config.get("load_in_8bit") or not config.get("load_in_4bit"):
            eight = Scheme(integer(8, None))
            return lambda module: eight
        kind = config.get("bnb_4bit_quant_type", "fp4")
        if kind != "nf4":
            raise ModelError(
                f"bitsandbytes' bnb_4bit_quant_type {short(kind)} is not read; quantkit reads nf4 and int8"
            )
        four = Scheme(Grid(_NF4, "group", 64))
        return lambda module: four

    def dimensions(self, tensors: Mapping[str, Any], scheme: Scheme) -> Shape:
        if scheme.weights.number != _NF4:
            self.needs(tensors, "weight", "SCB")
            shape = tuple(tensors["weight"].shape)
            if len(shape) != 2:
                raise ModelError(f"an int8 weight has the shape {list(shape)}; {CORRUPT}")
            return shape[0], shape[1]
        n, k = self._state(tensors)["shape"]
        return n, k

    def scale_values(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
        return self.unpack(tensors, scheme).scale

    def _state(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON of a weight, checked."""
        self.needs(tensors, "weight", "weight.absmax", "weight.quant_map", _STATE)
        try:
            state = json.loads(bytes(tensors[_STATE].tolist()))
            n, k = state["shape"]
            size = state["blocksize"]
            fits = (
                all(type(each) is int and each > 0 for each in (n, k, size)) and state["quant_type"] == "nf4"
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(
                f"its quant_state is not what bitsandbytes writes ({error}); {CORRUPT}"
            ) from None
        if not fits or math.prod(tensors["weight"].shape) * 2 != n * k:
            raise ModelError(f"its quant_state {short(state)} does not fit its weight; {CORRUPT}")
        if k % size:
            raise ModelError(
                f"blocks of {size} go over the ends of its rows of {k}, which quantkit does not read"
            )
        return dict(state)

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        import torch

        from quantkit.numerics.weight import QuantizedWeight

        n, k = self.dimensions(tensors, scheme)
        if scheme.weights.number != _NF4:
            if tensors["weight"].dtype != torch.int8 or tensors["SCB"].numel() != n:
                raise ModelError(
                    f"a weight {tensors['weight'].dtype} is not int8 with a scale a row; {CORRUPT}"
                )
            codes = (tensors["weight"].to(torch.int16) + 128).to(torch.uint8)
            return QuantizedWeight(codes, tensors["SCB"].float().view(n, 1) / 127, None, scheme.weights)
        state = self._state(tensors)
        table = torch.tensor(_NF4.values)
        if not torch.allclose(tensors["weight.quant_map"].float(), table, rtol=0, atol=1e-6):
            raise ModelError(f"its quant_map is not the table of NF4; {CORRUPT}")
        pairs = tensors["weight"].view(-1)
        codes = torch.stack([pairs >> 4, pairs & 15], -1).view(n, k)
        scale = _scales(tensors, state).view(n, k // state["blocksize"])
        return QuantizedWeight(codes, scale, None, Grid(_NF4, "group", state["blocksize"]))


def _scales(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> torch.Tensor:
    """The scales, fp32, decoded where they are quantized themselves."""
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" not in tensors:
        return absmax.float()
    table, size = tensors["weight.nested_quant_map"].float(), state.get("nested_blocksize")
    offset = state.get("nested_offset", 0.0)
    if type(size) is not int or size < 1 or not isinstance(offset, float | int) or not math.isfinite(offset):
        raise ModelError(f"its quant_state {short(state)} says nothing of its nested scales; {CORRUPT}")
    whole = tensors["weight.nested_absmax"].float().repeat_interleave(size)[: absmax.numel()]
    return table[absmax.long()] * whole + offset
