"""File formats of quantized linears, by name: what each stores for one linear and how `config.json` describes it.

A format is one `Codec`. Everything outside this folder asks it for names, shapes and dtypes of the stored tensors.
To add a format, write a subclass and decorate it with `register`; a shipped one is listed in `SHIPPED` too, which
is read without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import ModelError
from quantkit.formats.foreign import METHODS

if TYPE_CHECKING:
    import torch
    from quantkit_kernels import Spec, Stored

    from quantkit.numerics.inputs import InputScale
    from quantkit.numerics.weight import QuantizedWeight
    from quantkit.scheme import KVScheme, Scheme

SHIPPED = {  # name -> the module that registers it
    "compressed-tensors": "quantkit.formats.compressed_tensors",
    "memory": "quantkit.formats.memory",
}
READ = {  # quant_method of other tools' checkpoints -> the module that reads them
    "auto-round": "quantkit.formats.auto_round",
    "awq": "quantkit.formats.awq",
    "bitsandbytes": "quantkit.formats.bitsandbytes",
    "fp8": "quantkit.formats.fine_grained_fp8",
    "gptq": "quantkit.formats.gptq",
    "modelopt": "quantkit.formats.modelopt",
    "mxfp4": "quantkit.formats.mxfp4",
}
DEFAULT = "compressed-tensors"
MEMORY = "memory"  # of what `quantize_in_memory` makes: no file holds it
Shape = tuple[int, int]  # (N, K) of a weight


class Codec(ABC):
    """One on-disk format. The tensors of a linear called P are stored as P + joint + leaf; a bias stays "P.bias".

    name: what a recipe's `output.format` says. method: `quant_method` of its `quantization_config`. container: the
    kind of file that holds the tensors. leaves: dtype of every leaf; None: the float type of the model, or what the
    scheme says (`dtypes`). scale: the leaf with the scales. apart: leaves that stay beside the packed weight that a
    kernel is given. positive: leaves whose values are above 0. order: the leaf of linears with columns out of order
    that gives the group of every column.
    """

    name: ClassVar[str]
    method: ClassVar[str]
    container: ClassVar[str] = "safetensors"
    leaves: ClassVar[Mapping[str, torch.dtype | None]]
    joint: ClassVar[str] = "."
    scale: ClassVar[str]
    apart: ClassVar[frozenset[str]] = frozenset()
    positive: ClassVar[frozenset[str]] = frozenset()
    order: ClassVar[str | None] = None
    writes: ClassVar[bool] = True  # else it is one that quantkit only reads (`reader.py`)

    def of(self, config: Mapping[str, Any]) -> Codec:
        """The codec for the tensors that a `quantization_config` of this method describes."""
        return self

    def dtypes(self, scheme: Scheme) -> Mapping[str, torch.dtype | None]:
        """Dtype of every leaf of a scheme; None: the float type of the model."""
        return self.leaves

    @abstractmethod
    def shapes(self, n: int, k: int, scheme: Scheme) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor of a weight [N, K], by leaf; the keys are the leaves this scheme has."""

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The stored tensors of one linear whose inputs are not quantized, by leaf."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of `pack`. ModelError if tensors are missing, foreign or of the wrong shape."""

    @abstractmethod
    def dimensions(self, tensors: Mapping[str, Any], scheme: Scheme) -> Shape:
        """(N, K) of the weight that these tensors are; looks at as few of them as it can."""

    @abstractmethod
    def config(
        self, schemes: Mapping[str, Scheme], ignore: Sequence[str], kv: KVScheme | None = None
    ) -> dict[str, Any]:
        """`quantization_config` of config.json. schemes: by module name; ignore: the linears left as they are.

        kv: of a cache whose scales are stored, None without one (see `unstorable_cache`).
        """

    @abstractmethod
    def parse(self, config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
        """The inverse of `config`: module name of a linear -> its Scheme, or None if it is not quantized.

        ModelError naming what is corrupt in it, or what it asks for that quantkit does not read.
        """

    def pack_scheme(
        self, weight: QuantizedWeight, scheme: Scheme, inputs: InputScale | None = None
    ) -> dict[str, torch.Tensor]:
        """`pack`, of a linear whose inputs may be quantized; inputs: their range, if it is calibrated."""
        if scheme.inputs is not None:
            raise ModelError(f"the format {self.name} stores weights only, not {scheme}")
        return self.pack(weight)

    def codes_leaf(self, scheme: Scheme) -> str:
        """The leaf that holds the codes of a weight, row by row; its name sorts before those that go with rows."""
        raise ModelError(f"the format {self.name} is not written in pieces")

    def joined(
        self, leaf: str, parts: Sequence[torch.Tensor], shape: Shape, global_scale: torch.Tensor | None
    ) -> torch.Tensor:
        """A leaf beside the codes of a weight [N, K] = shape, from what it is for pieces of its rows, in order.

        global_scale: of the whole weight, which is known, and may be asked for, before the pieces are.
        """
        raise ModelError(f"the format {self.name} is not written in pieces")

    def scale_values(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
        """What the stored scales of a weight stand for, fp32, in their stored shape."""
        return tensors[self.scale].float()

    def inputs_of(self, tensors: Mapping[str, torch.Tensor]) -> InputScale | None:
        """The calibrated range of the inputs among the stored tensors of a linear, None if they have none."""
        return None

    def kv_scheme(self, config: Mapping[str, Any]) -> KVScheme | None:
        """How `config` quantizes the KV cache with stored scales; None: not at all."""
        return None

    def stored(self, tensors: Mapping[str, torch.Tensor], spec: Spec, scheme: Scheme) -> Stored:
        """The weight as kernels take it. A format that stores these very tensors overrides it and copies nothing."""
        from quantkit_kernels import Stored, pack_bits

        weight = self.unpack(tensors, scheme)
        zero = (
            None if weight.zero is None else pack_bits(weight.zero.T.contiguous(), spec.bits).T.contiguous()
        )
        scale = weight.scale if scheme.weights.scale is None else weight.scales()
        codes = pack_bits(weight.codes, spec.bits)
        return Stored(codes, scale.contiguous(), zero, spec, divisor=weight.global_scale)

    def from_stored(
        self, stored: Stored, scheme: Scheme, apart: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The inverse of `stored`: the tensors of the file. apart: those that were kept beside it."""
        from quantkit_kernels import unpack_bits

        from quantkit.numerics.weight import QuantizedWeight, column_order

        spec, zero = stored.spec, stored.zero_packed
        zero = None if zero is None else unpack_bits(zero.T, spec.bits, spec.n).T.contiguous()
        codes = unpack_bits(stored.packed, spec.bits, spec.k).contiguous()
        group_of = apart.get(self.order) if self.order else None
        order = None if group_of is None else column_order(group_of.long(), spec.groups)
        weight = QuantizedWeight(codes, stored.scale, zero, scheme.weights, order=order)
        return self.pack_scheme(self.narrowed(weight, apart), scheme, self.inputs_of(apart))

    def narrowed(self, weight: QuantizedWeight, apart: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """A weight whose scales are floats, as kernels take them, with the scales that the format stores."""
        return weight

    def linears(
        self, name: str, tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
        """(name, tensors) of each of the linears that what is stored under one name holds: of a stack of experts."""
        yield name, tensors

    def beside(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of what a tensor that is not quantized becomes where stacks are taken apart."""
        yield name, tensor

    def cut(
        self, leaf: str, tensor: torch.Tensor, scheme: Scheme, sizes: Sequence[int], rows: Sequence[int]
    ) -> list[torch.Tensor] | None:
        """A stored tensor of a linear, cut into those of linears with `sizes` of its outputs; None if it cannot be.

        rows: of what each of these stores in this place.
        """
        return None

    def older(self, tensors: Mapping[str, Any], scheme: Scheme) -> bool:
        """Whether the tensors of a linear are in an older form of the format, which `unpack` reads and no layer runs.

        tensors: by leaf; of them, shapes and the values of small ones are looked at.
        """
        return False


CODECS: dict[str, Codec] = {}


def register(kind: type[Codec]) -> type[Codec]:
    """Class decorator: makes the format available under its name."""
    CODECS[kind.name] = kind()
    return kind


def names() -> list[str]:
    """The formats there are; without torch."""
    return sorted({*SHIPPED, *(name for name, each in CODECS.items() if each.writes)})


def unstorable_cache(name: str, kv: KVScheme) -> str | None:
    """Why the format called `name` cannot store what a KV cache needs, or None."""
    if kv.dynamic or name == DEFAULT:
        return None
    return f"the format {name} stores no scales of a KV cache; use kv_cache: INT8, which needs none"


def unstorable(name: str, scheme: Scheme) -> str | None:
    """Why the format called `name` cannot store a scheme, or None; without torch for the shipped ones."""
    from quantkit.formats.compressed_tensors_config import format_of, memory_format

    if name not in (DEFAULT, MEMORY):
        return None if scheme.inputs is None else f"the format {name} stores weights only, not {scheme}"
    try:
        (memory_format if name == MEMORY else format_of)(scheme)
    except ModelError as error:
        other = name == DEFAULT and unstorable(MEMORY, scheme) is None
        return f"{error}; or use quantkit.quantize_in_memory, which writes no file" if other else str(error)
    return None


def codec(name: str = DEFAULT) -> Codec:
    """The format called `name`; an unknown name is a KeyError that lists the known ones."""
    if name not in CODECS and name in SHIPPED:
        import_module(SHIPPED[name])
    if name not in CODECS:
        raise KeyError(f"unknown format {name!r}; known: {', '.join(names())}")
    return CODECS[name]


def codec_of(config: Any) -> Codec:
    """The format that a `quantization_config` names; ModelError if none here reads it."""
    if not isinstance(config, Mapping):
        raise ModelError(f"quantization_config must be an object, got {_short(config)}; the file is corrupt")
    method = config.get("quant_method")
    if isinstance(method, str) and method in READ:
        import_module(READ[method])  # without torch
        return next(each for each in CODECS.values() if each.method == method).of(config)
    known = [codec(name) for name in names()]
    for each in known:
        if each.method == method:
            return each.of(config)
    tool = METHODS.get(method) if isinstance(method, str) else None
    read = sorted({DEFAULT, *READ, *(each.method for each in known if each.name not in SHIPPED)})
    raise ModelError(
        f"quantization method {_short(method)}{f' ({tool})' if tool else ''} is not one quantkit reads; it reads "
        f"{', '.join(map(repr, read))}; load it with the tool that wrote it, or quantize the "
        "original model with quantkit"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
