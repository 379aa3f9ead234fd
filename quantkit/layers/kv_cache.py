"""A quantized KV cache for transformers models: `attach` makes a model use one wherever it would use an exact one.

Without a cache (`use_cache=False`) entries are rounded all the same, as compressed-tensors does it: a model computes
one function, however it is called. Whoever passes a cache object of transformers itself gets that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from quantkit.errors import ModelError
from quantkit.layers import kv_attention
from quantkit.layers.kv_attention import Carried
from quantkit.layers.kv_entries import Entries
from quantkit.numerics.kv import KVScales
from quantkit.scheme import KVScheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTRIBUTE = "quantkit_kv_cache"  # of a model: its `Attached`
KEYS, VALUES = "k_scale", "v_scale"  # buffers of an attention module: its stored scales
_LAYERS = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
)  # types that keep keys and values by token


class QuantizedLayer(CacheLayerMixin):
    """Keys and values of one layer as codes. `update` returns what attention reads, `Carried`.

    The layer keeps every token, also of sliding windows: those are a matter of the mask.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, scheme: KVScheme, scales: KVScales | None = None) -> None:
        CacheLayerMixin.__init__(self)
        self.scheme, self.scales = scheme, scales
        self.reset()

    def reset(self) -> None:
        scheme, scales = self.scheme, self.scales
        k, v = (None, None) if scales is None else (scales.keys, scales.values)
        self.entries = (
            Entries(scheme.keys, scheme.sinks, scheme.residual, scheme.rotate, k),
            Entries(scheme.values, scheme.sinks, scheme.residual, False, v),
        )
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for entries in self.entries:
            if entries.stored is not None:
                entries.stored = entries.stored.to(key_states.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        found = []
        for entries, x in zip(self.entries, (key_states, value_states), strict=True):
            entries.append(x)
            found.append(Carried(entries, x, len(entries)))
        keys, values = found
        return keys, values  # type: ignore[return-value]  # tensors to whoever asks

    def get_seq_length(self, *args: Any) -> int:
        return len(self.entries[0])

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + count, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.23

    def crop(self, tokens_to_remove: int) -> None:
        for entries in self.entries:
            entries.crop(max(0, len(entries) - abs(tokens_to_remove)))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._each(lambda t: _rows(t, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: _rows(t, torch.arange(t.shape[0]).repeat_interleave(repeats)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each(lambda t: _rows(t, torch.arange(t.shape[0])[indices.cpu()]))

    def offload(self) -> None:
        self._each(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._each(lambda t: t.to(self.device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for entries in self.entries:
            entries.each(change)


class QuantizedCache(Cache):
    """The cache of a whole model. scales: by layer, of a scheme with stored ones.

    description: in words. exact_chunk: tokens that one forward may add for what one token at a time gives, None: any
    number. Entries are rounded when they come and read rounded, but for those of a residual window.
    """

    def __init__(self, layers: int, scheme: KVScheme, scales: Mapping[int, KVScales] | None = None) -> None:
        made = [QuantizedLayer(scheme, None if scales is None else scales[i]) for i in range(layers)]
        super().__init__(layers=list(made))
        self.scheme, self.description = scheme, str(scheme)
        self.exact_chunk = 1 if scheme.residual else None

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take."""
        layers = (layer for layer in self.layers if isinstance(layer, QuantizedLayer))
        return sum(entries.nbytes for layer in layers for entries in layer.entries)


@dataclass(frozen=True)
class Attached:
    """What a model was told about its cache."""

    scheme: KVScheme
    scales: Mapping[int, KVScales] | None
    layers: int

    def make(self) -> QuantizedCache:
        """An empty cache."""
        return QuantizedCache(self.layers, self.scheme, self.scales)


def attach(model: PreTrainedModel, scheme: KVScheme, scales: Mapping[int, KVScales] | None = None) -> None:
    """Make `model` use a quantized cache in `generate` and in every forward without a cache of its own.

    scales: by layer, of a scheme with stored ones. ModelError for a model whose cache is not keys and values by token.
    """
    config = model.config.get_text_config(decoder=True)
    reason = _why_not(model, config, scheme)
    if reason:
        raise ModelError(f"the KV cache of {type(model).__name__} cannot be quantized to {scheme}: {reason}")
    count = config.num_hidden_layers
    if not scheme.dynamic and (scales is None or set(scales) != set(range(count))):
        have = sorted(scales or ())
        raise ModelError(f"{scheme} needs stored scales of {count} layers, got those of {have[:8] or 'none'}")
    kv_attention.register()
    model.set_attn_implementation(kv_attention.NAME)
    known = ATTRIBUTE in model.__dict__
    model.__dict__[ATTRIBUTE] = Attached(scheme, scales, count)
    model.__dict__["_prepare_cache_for_generation"] = partial(_prepare, model)
    if not known:
        model.register_forward_pre_hook(_give, with_kwargs=True)
        model.register_forward_hook(_keep, with_kwargs=True)


def attached(model: Any) -> Attached | None:
    """What `attach` has told a model, None if its cache is exact."""
    found = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    return found if isinstance(found, Attached) else None


def cache_of(model: Any) -> Callable[[], QuantizedCache] | None:
    """Makes empty caches of the kind that a model uses; None if its cache is exact."""
    found = attached(model)
    return None if found is None else found.make


def _why_not(model: PreTrainedModel, config: Any, scheme: KVScheme) -> str | None:
    types = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "kv_lora_rank", None):
        return "it keeps compressed keys and values (multi-head latent attention)"
    if types - set(_LAYERS):
        return f"it has layers of type {', '.join(sorted(types - set(_LAYERS)))}"
    if getattr(config, "num_kv_shared_layers", None):
        return "its layers share keys and values"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not go through transformers' attention interface"
    heads = getattr(config, "num_attention_heads", None)
    d = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    if scheme.rotate and d and d & (d - 1):
        return f"a rotation needs a power of two of channels per head, it has {d}; use rotate: false"
    sizes = [
        grid.group_size
        for grid in (scheme.keys, scheme.values)
        if grid.granularity == "token" and grid.group_size
    ]
    if d and any(d % size for size in sizes):
        return f"groups of {max(sizes)} channels do not divide a head of {d}"
    return None


def _prepare(
    model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any
) -> Any:
    """As transformers' method, with our cache where it would make one."""
    if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
        if generation_config.cache_implementation is not None:
            named = generation_config.cache_implementation
            raise ModelError(f"this model has a quantized KV cache; leave out cache_implementation={named!r}")
        make = cache_of(model)
        assert make is not None
        model_kwargs["past_key_values"] = make()
        return None
    return type(model)._prepare_cache_for_generation(  # type: ignore[attr-defined]
        model, generation_config, model_kwargs, *rest, **more
    )


def _give(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """A forward without a cache gets an empty one of ours."""
    make = cache_of(model)
    if (
        make is None
        or kwargs.get("past_key_values") is not None
        or any(isinstance(arg, Cache) for arg in args)
    ):
        return None
    return args, kwargs | {"past_key_values": make()}


def _keep(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A forward that was to use no cache gives none back: the next call would continue it."""
    if kwargs.get("use_cache") is False and getattr(output, "past_key_values", None) is not None:
        output.past_key_values = None


def _rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a batch; FP8 as bytes, which every operation takes."""
    index = index.to(tensor.device)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).index_select(0, index).view(tensor.dtype)
    return tensor.index_select(0, index)


OWN_HOOKS = (_give, _keep)  # those that `attach` registers
