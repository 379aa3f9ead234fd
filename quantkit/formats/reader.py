"""`Reader`: a format of another tool, which quantkit reads and never writes.

Its linears are packed anew while a checkpoint is loaded, into the tensors of `memory.py`, so kernels see one packing
only. A linear is quantized if its codes are stored in the format; lists of skipped modules need not be read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.errors import ModelError
from quantkit.formats.compressed_tensors_config import CORRUPT, short
from quantkit.formats.patterns import PatternError, matches
from quantkit.formats.registry import Codec
from quantkit.scheme import KVScheme, Scheme, integer

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.weight import QuantizedWeight

_SCALES = frozenset({"k_scale", "v_scale"})


class Reader(Codec):
    """A format that is only read."""

    writes = False
    positive = _SCALES

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The weight that the tensors of one linear, by leaf, stand for."""

    def shapes(self, n: int, k: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
        raise ModelError(self._read_only)

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        raise ModelError(self._read_only)

    def config(
        self, schemes: Mapping[str, Scheme], ignore: Sequence[str], kv: KVScheme | None = None
    ) -> dict[str, Any]:
        raise ModelError(self._read_only)

    @property
    def _read_only(self) -> str:
        return f"the format {self.name} is read, never written; quantkit writes compressed-tensors"

    def needs(self, tensors: Mapping[str, Any], *leaves: str) -> None:
        """ModelError unless these leaves are there."""
        if missing := [leaf for leaf in leaves if leaf not in tensors]:
            raise ModelError(
                f"a linear of the format {self.name} lacks {', '.join(missing)}, it has {', '.join(sorted(tensors))}; "
                f"{CORRUPT}"
            )


def integers(what: str, settings: Mapping[str, Any], bits: Sequence[int], symmetric: bool) -> Scheme:
    """The scheme of integer weights with the `bits` and `group_size` of a config; ModelError if it is not read."""
    asked, size = settings.get("bits"), settings.get("group_size", 128)
    if type(asked) is not int or asked not in bits or type(size) is not int or not (size == -1 or size > 0):
        raise ModelError(
            f"{what}: bits {short(asked)}, group_size {short(size)} is not read; quantkit reads "
            f"{', '.join(map(str, bits))} bits by group, or -1 for a whole row"
        )
    return Scheme(integer(asked, None if size == -1 else size, symmetric))


def overridden(
    settings: Mapping[str, Any], overrides: Mapping[str, Any], module: str
) -> Mapping[str, Any] | None:
    """The settings of one module: those of the first pattern that fits its name go before the general ones.

    overrides: pattern -> settings; a pattern that begins with "-:" leaves the module out, which gives None.
    """
    for pattern, own in overrides.items():
        sign, body = (pattern[0], pattern[2:]) if pattern[:2] in ("+:", "-:") else ("+", pattern)
        try:
            fits = body == module or matches(body, module)
        except PatternError as error:
            raise ModelError(
                f"quantization_config: the pattern {short(pattern)} cannot be used: {error}"
            ) from None
        if fits:
            return None if sign == "-" else {**settings, **(own if isinstance(own, Mapping) else {})}
    return settings


def by_name(make: Callable[[str], Scheme | None]) -> Callable[[str], Scheme | None]:
    """`make` with its answers kept, since many modules are asked for more than once."""
    known: dict[str, Scheme | None] = {}

    def scheme_of(module: str) -> Scheme | None:
        if module not in known:
            known[module] = make(module)
        return known[module]

    return scheme_of
