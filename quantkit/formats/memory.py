"""The tensors of a linear that is never written to a file: those of compressed-tensors, for every number format.

What compressed-tensors has no format for (NF4) is packed as integers are, with its codes in place of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantkit.errors import ModelError
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.compressed_tensors_config import memory_format
from quantkit.formats.registry import MEMORY, register
from quantkit.scheme import KVScheme, Scheme


@register
class Memory(CompressedTensors):
    """The codec of layers that are made in memory; no `config.json` describes them."""

    name = MEMORY
    method = "quantkit-memory"

    def kind(self, scheme: Scheme) -> str:
        return memory_format(scheme)

    def config(
        self, schemes: Mapping[str, Scheme], ignore: Sequence[str], kv: KVScheme | None = None
    ) -> dict[str, Any]:
        raise ModelError(
            "linears that were quantized in memory are not written to a file; use `quantkit.quantize`"
        )

    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        """Of a checkpoint by another tool that was packed anew: `schemes`, by module; never what a file says."""
        schemes = config.get("schemes")
        if not isinstance(schemes, Mapping) or not all(isinstance(each, Scheme) for each in schemes.values()):
            raise ModelError(f"no checkpoint is in the format {self.name!r}; its config.json is corrupt")
        return schemes.get

    def kv_scheme(self, config: Mapping[str, Any]) -> KVScheme | None:
        kv = config.get("kv_cache")
        return kv if isinstance(kv, KVScheme) else None
