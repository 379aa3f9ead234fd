"""Run a whole decode step in one native call: tables of tensors in, logits out (decode.h).

`Tables` holds the addresses of a model's weights and may be shared; a `Decoder` is one sequence over them, its cache
and its buffers. Nothing here knows a model family.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from quantkit_kernels.cpu import library
from quantkit_kernels.cpu.layout import Packed, check_bias, check_units

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # qk::Type
_MOST = 2**31 - 1  # of an int in C
COMPUTES = {  # qk::Compute
    "float": 0,
    "int8": 1,
    "int8-token": 2,
    "halves": 3,
    "int8-range": 4,
    "fp8-range": 5,
    "fp8-group": 6,
}
MOST_SINKS = 128  # qk::PAGE
CACHES = {"fp32": 0, "bf16": 1, "int8": 8, "int4": 9, "fp8_e4m3": 10}  # qk::Cache


class Cache(NamedTuple):
    """What a decoder's cache holds.

    kind: one of CACHES; integers have a scale per token and head, fp8_e4m3 those of the layers (`Layer.kv_scales`).
    rotate: queries and keys are multiplied by a Hadamard matrix. sinks: so many first tokens stay exact, up to
    MOST_SINKS, of integers only.
    """

    kind: str = "fp32"
    rotate: bool = False
    sinks: int = 0


class _Matrix(ctypes.Structure):
    _fields_ = (("weight", library.Weight), ("dense", ctypes.c_int32), ("compute", ctypes.c_int32))


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_float))


class _Mixture(ctypes.Structure):
    _fields_ = (
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        *((name, _Matrix) for name in ("router", "shared_gate", "shared_up", "shared_down", "shared_switch")),
        *((name, ctypes.c_int32) for name in ("count", "top", "normalise", "intermediate", "compute")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("input", "post", "q_norm", "k_norm")),
        *((name, _Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("k_scales", ctypes.c_void_p),
        ("v_scales", ctypes.c_void_p),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("whole_norms", ctypes.c_int32),
        ("mixture", ctypes.POINTER(_Mixture)),
    )


_SIZES = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "rotary_dim")


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("embedding", _Matrix),
        ("head", _Matrix),
        ("final", _Norm),
        *(
            (name, ctypes.c_int32)
            for name in ("layer_count", *_SIZES, "compute", "cache_type", "rotate", "sinks")
        ),
    )


@dataclass(frozen=True, eq=False)
class Matrix:
    """W [n, k] of y = x W^T + bias: packed, or dense, contiguous, in fp32, bf16 or fp16. bias: fp32 [n] or None.

    compute: how x is multiplied by a packed one, one of COMPUTES; None: as the decoder says.
    """

    weight: Packed | torch.Tensor
    bias: torch.Tensor | None = None
    compute: str | None = None

    def __post_init__(self) -> None:
        if self.compute not in (None, *COMPUTES):
            raise ValueError(f"unknown compute {self.compute!r}; known: {', '.join(COMPUTES)}")
        if isinstance(self.weight, Packed):
            check_units(self.weight.units, self.weight.spec, self.weight.scale_type)
        elif not _readable(self.weight, TYPES) or self.weight.dim() != 2:
            raise ValueError(
                f"a dense matrix is contiguous fp32, bf16 or fp16 [n, k] on the CPU, got {_said(self.weight)}"
            )
        if self.bias is not None:
            check_bias(self.bias, self.n)

    @property
    def n(self) -> int:
        return self.weight.spec.n if isinstance(self.weight, Packed) else self.weight.shape[0]

    def _structure(self) -> _Matrix:
        if isinstance(self.weight, Packed):
            compute = -1 if self.compute is None else COMPUTES[self.compute]
            return _Matrix(self.weight.weight(bias=self.bias), -1, compute)
        n, k = self.weight.shape
        bias = None if self.bias is None else self.bias.data_ptr()
        dense = library.Weight(units=self.weight.data_ptr(), bias=bias, n=n, k=k)
        return _Matrix(dense, TYPES[self.weight.dtype], -1)


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm: fp32 weight [size]."""

    weight: torch.Tensor
    eps: float

    def __post_init__(self) -> None:
        if not _readable(self.weight, (torch.float32,)) or self.weight.dim() != 1:
            raise ValueError(
                f"a norm's weight is contiguous fp32 [size] on the CPU, got {_said(self.weight)}"
            )

    def _structure(self) -> _Norm:
        return _Norm(self.weight.data_ptr(), self.eps)


@dataclass(frozen=True, eq=False)
class Mixture:
    """The experts of a block: softmax(router x), of which the `top` largest count, divided by their sum if `normalise`.

    router: dense [E, hidden]. gate_up: (gate, up) of every expert, down: of every expert, all packed, of one shape and
    compute. shared: (gate, up, down) of an expert for all tokens, packed, whose output is multiplied by
    sigmoid(switch x); switch: dense [1, hidden]; None: as it is.
    """

    router: Matrix
    gate_up: tuple[tuple[Matrix, Matrix], ...]
    down: tuple[Matrix, ...]
    top: int
    normalise: bool
    shared: tuple[Matrix, Matrix, Matrix] | None = None
    switch: Matrix | None = None

    def __post_init__(self) -> None:
        if not self.down or len(self.gate_up) != len(self.down):
            raise ValueError(f"there are gates of {len(self.gate_up)} experts and down of {len(self.down)}")
        if not 1 <= self.top <= len(self.down):
            raise ValueError(f"a token has 1 to {len(self.down)} experts, got {self.top}")
        matrices = [*(part for pair in self.gate_up for part in pair), *self.down]
        if not all(isinstance(each.weight, Packed) for each in (*matrices, *(self.shared or ()))):
            raise ValueError("experts are packed; these have dense matrices")
        if len({each.compute for each in matrices}) > 1:
            raise ValueError("all experts of a block have one compute")

    def _structure(self) -> tuple[_Mixture, Any]:
        """The C struct and what it points at."""
        gate_up = [part._structure().weight for pair in self.gate_up for part in pair]
        down = [each._structure().weight for each in self.down]
        arrays = tuple((library.Weight * len(weights))(*weights) for weights in (gate_up, down))
        found = _Mixture(
            *map(ctypes.addressof, arrays), count=len(down), top=self.top, normalise=self.normalise
        )
        found.intermediate, found.compute = self.gate_up[0][0].n, self.down[0]._structure().compute
        parts: dict[str, Matrix | None] = {"router": self.router, "shared_switch": self.switch}
        parts.update(zip(("shared_gate", "shared_up", "shared_down"), self.shared or (), strict=False))
        for name, part in parts.items():
            if part is not None:
                setattr(found, name, part._structure())
        return found, arrays


@dataclass(frozen=True, eq=False)
class Layer:
    """One block. qkv: (q, k, v) or one matrix with all rows; gate_up likewise; window: None sees everything.

    q_norm, k_norm: before rotary, per head or, with whole_norms, over all heads together; or None. scale: of q k^T.
    kv_scales: fp32 [kv_heads] of an FP8 cache's keys and values, which are divided by them; or None. mixture: experts
    in place of gate_up and down, which are then () and None.
    """

    input: Norm
    post: Norm
    qkv: tuple[Matrix, ...]
    o: Matrix
    gate_up: tuple[Matrix, ...]
    down: Matrix | None
    scale: float
    window: int | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None
    whole_norms: bool = False
    mixture: Mixture | None = None

    @cached_property
    def _mixture(self) -> tuple[_Mixture, Any] | None:
        return None if self.mixture is None else self.mixture._structure()

    def _structure(self) -> _Layer:
        layer = _Layer(window=self.window or 0, scale=self.scale, whole_norms=self.whole_norms)
        if self._mixture is not None:  # kept: the struct is pointed at
            layer.mixture = ctypes.pointer(self._mixture[0])
        if self.kv_scales is not None:
            layer.k_scales, layer.v_scales = (scale.data_ptr() for scale in self.kv_scales)
        matrices: dict[str, Matrix | None] = dict(zip(("q", "k", "v"), self.qkv, strict=False))
        matrices |= dict(zip(("gate", "up"), self.gate_up, strict=False))
        matrices |= {"o": self.o, "down": self.down}
        norms = {"input": self.input, "post": self.post, "q_norm": self.q_norm, "k_norm": self.k_norm}
        for name, part in (matrices | norms).items():
            if part is not None:
                setattr(layer, name, part._structure())
        return layer


@dataclass(frozen=True, eq=False)
class Tables:
    """A model. embedding: dense [vocabulary, hidden]; rotary_dim: of the head_dim dimensions, the first ones."""

    layers: tuple[Layer, ...]
    embedding: Matrix
    head: Matrix
    final: Norm
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int

    def __post_init__(self) -> None:
        """Raise ValueError for what the native code cannot check: sizes of norms and C ints. It checks the matrices."""
        for name in _SIZES:
            if not 0 <= getattr(self, name) <= _MOST:
                raise ValueError(f"{name} must be 0 to {_MOST}, got {getattr(self, name)}")
        norms: list[tuple[str, Norm | None, int]] = [("final", self.final, self.hidden)]
        for i, layer in enumerate(self.layers):
            inner = (0,) if layer.mixture else (1, 2)
            if (
                len(layer.qkv) not in (1, 3)
                or len(layer.gate_up) not in inner
                or bool(layer.mixture) == bool(layer.down)
            ):
                raise ValueError(
                    f"layer {i} has {len(layer.qkv)} of q, k, v, {len(layer.gate_up)} of gate, up, "
                    f"{'a' if layer.down else 'no'} down and {'a' if layer.mixture else 'no'} mixture"
                )
            if not 0 <= (layer.window or 0) <= _MOST:
                raise ValueError(f"the window of layer {i} must be 0 to {_MOST} tokens, got {layer.window}")
            for scale in layer.kv_scales or ():
                if not _readable(scale, (torch.float32,)) or scale.shape != (self.kv_heads,):
                    raise ValueError(
                        f"scales of layer {i} are fp32 [{self.kv_heads}] on the CPU, got {_said(scale)}"
                    )
            norms += [(f"layer {i} {name}", getattr(layer, name), self.hidden) for name in ("input", "post")]
            per_head = self.head_dim
            sizes = (
                (self.heads * per_head, self.kv_heads * per_head) if layer.whole_norms else (per_head,) * 2
            )
            norms += [
                (f"layer {i} q_norm", layer.q_norm, sizes[0]),
                (f"layer {i} k_norm", layer.k_norm, sizes[1]),
            ]
        for name, norm, size in norms:
            if norm is not None and len(norm.weight) != size:
                raise ValueError(f"the norm {name} has {len(norm.weight)} weights, the model needs {size}")

    @cached_property
    def _array(self) -> ctypes.Array[Any]:
        return (_Layer * len(self.layers))(*(layer._structure() for layer in self.layers))

    def _structure(self, compute: str, cache: Cache) -> _Model:
        return _Model(
            self._array,
            self.embedding._structure(),
            self.head._structure(),
            self.final._structure(),
            len(self.layers),
            *(getattr(self, name) for name in _SIZES),
            COMPUTES[compute],
            CACHES[cache.kind],
            cache.rotate,
            cache.sinks,
        )


def _readable(tensor: torch.Tensor, dtypes: Collection[torch.dtype]) -> bool:
    """Whether the native code can read the tensor in place."""
    return tensor.dtype in dtypes and tensor.is_cpu and tensor.is_contiguous()


def _said(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


class Decoder:
    """One sequence. One thread at a time may use it; several decoders may share their tables and run concurrently.

    compute: how packed matrices are multiplied: "float", "int8", "int8-token", or "halves", float with 15 bits of
    each activation, for models whose own type is bf16 or fp16.
    """

    def __init__(self, tables: Tables, compute: str = "float", cache: Cache | None = None) -> None:
        cache = cache or Cache()
        if compute not in COMPUTES:
            raise ValueError(f"unknown compute {compute!r}; known: {', '.join(COMPUTES)}")
        if cache.kind not in CACHES:
            raise ValueError(f"unknown cache {cache.kind!r}; known: {', '.join(CACHES)}")
        if not 0 <= cache.sinks <= MOST_SINKS or (cache.sinks and cache.kind not in ("int8", "int4")):
            raise ValueError(
                f"0 to {MOST_SINKS} first tokens stay exact, in a cache of integers; got {cache.sinks} in {cache.kind}"
            )
        if cache.kind == "fp8_e4m3" and any(layer.kv_scales is None for layer in tables.layers):
            raise ValueError("an FP8 cache needs the scales of every layer")
        self.library = _load()
        self.tables = tables  # whose tensors the native side points at
        self.handle = self.library.qk_decoder_new(ctypes.byref(tables._structure(compute, cache)))
        if not self.handle:
            raise ValueError("the decoder takes no model of these sizes, or memory is out")
        weakref.finalize(self, self.library.qk_decoder_free, self.handle)

    def step(self, tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keep: int = 1) -> torch.Tensor:
        """Append tokens int64 [M]; cos, sin: fp32 [M, rotary_dim] of their positions.

        Returns fp32 logits [keep, vocabulary] of the last `keep` tokens. Threads: torch.get_num_threads().
        """
        m, size = tokens.numel(), self.tables.rotary_dim
        fits = tokens.dtype == torch.int64 and tokens.dim() == 1 and m > 0 and 0 <= keep <= m
        angles = all(t.shape == (m, size) and t.is_cpu and t.is_floating_point() for t in (cos, sin))
        if not (fits and angles and tokens.is_cpu):
            raise ValueError(
                f"wanted int64 tokens [M >= 1], cos and sin [M, {size}] on the CPU, 0 <= keep <= M; got "
                f"{_said(tokens)}, {_said(cos)}, {_said(sin)}, keep {keep}"
            )
        tokens, cos, sin = tokens.contiguous(), cos.float().contiguous(), sin.float().contiguous()
        logits = torch.empty(keep, self.tables.head.n)
        failed = self.library.qk_decoder_step(
            self.handle,
            tokens.data_ptr(),
            m,
            cos.data_ptr(),
            sin.data_ptr(),
            keep,
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        if failed == 2:
            raise MemoryError(f"no memory for {m} more tokens after {self.length}")
        if failed:
            raise ValueError(f"the decoder refused a step of {m} tokens; is a token outside the vocabulary?")
        return logits

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        length: int = self.library.qk_decoder_length(self.handle)
        return length

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache, in bytes."""
        size: int = self.library.qk_decoder_cache_bytes(self.handle)
        return size

    def truncate(self, length: int) -> None:
        """Drop the tokens after the first `length`; the memory stays allocated."""
        if not 0 <= length <= self.length or self.library.qk_decoder_truncate(self.handle, length):
            raise ValueError(f"cannot keep {length} of {self.length} tokens")


def _load() -> ctypes.CDLL:
    """The library with the decoder's signatures."""
    native = library.required()
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, result, arguments in (
        ("new", pointer, (ctypes.POINTER(_Model),)),
        ("free", None, (pointer,)),
        ("step", number, (pointer, pointer, long, pointer, pointer, long, pointer, number)),
        ("step_together", number, (pointer, long, pointer, pointer, pointer, pointer, number)),
        ("time", None, (pointer, pointer)),
        ("length", long, (pointer,)),
        ("truncate", number, (pointer, long)),
        ("cache_bytes", ctypes.c_size_t, (pointer,)),
    ):
        function = getattr(native, f"qk_decoder_{name}")
        function.restype, function.argtypes = result, arguments
    return native
