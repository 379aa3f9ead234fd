"""How the model calls its decoder blocks: which arguments all windows share, and which depend on the tokens.

Masks and rotary tables depend only on how many windows run at once: they are recorded once for each such number. Some
models also pass what they computed from the tokens (the per-layer inputs of Gemma 4). These arguments are found by
comparing the calls for two windows that differ in every token, and they are kept for every chunk of windows: memory of
the size of these arguments, for all blocks. Dictionaries that blocks write into, for later blocks to read, are given to
each call as a copy; `Streams.shared` carries their contents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.calibration.forward import Call, block_form, embed
from quantkit.calibration.returned import Form
from quantkit.calibration.streams import Shared
from quantkit.calibration.trees import Place, leaves, rebuilt
from quantkit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _tree(call: Call) -> tuple[Any, ...]:
    return (call.args, call.kwargs)


def mappings(call: Call) -> dict[str, MutableMapping[Any, Any]]:
    """The dictionaries among the arguments of a call, by the place where they stand."""
    return {spelled(at): mapping for at, mapping in _mappings(_tree(call))}


def written(call: Call, before: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a call has changed one of the dictionaries among its arguments; before: copies of them, by place."""
    return any(
        mapping.keys() != before[place].keys() or any(mapping[k] is not v for k, v in before[place].items())
        for place, mapping in mappings(call).items()
    )


def _mappings(tree: Any, at: Place = ()) -> Iterator[tuple[Place, MutableMapping[Any, Any]]]:
    if isinstance(tree, tuple | list):
        for number, item in enumerate(tree):
            yield from _mappings(item, (*at, number))
    elif isinstance(tree, MutableMapping):
        if len(at) > 1:  # (1,) is the keyword arguments themselves
            yield at, tree
        for key, item in tree.items():
            yield from _mappings(item, (*at, key))


def spelled(at: Place) -> str:
    """(1, "attention_mask", 0) -> "attention_mask.0"; positional arguments after the hidden states count from 1."""
    first = at[1] if at[0] == 1 else f"argument {at[1] + 1}"
    return ".".join(map(str, (first, *at[2:])))


def differing(one: Call, other: Call) -> tuple[Place, ...]:
    """Places of the tensors that differ between two calls of one block; ModelError if anything else differs."""
    first, second = dict(leaves(_tree(one))), dict(leaves(_tree(other)))
    found = []
    for at in first.keys() | second.keys():
        a, b = first.get(at), second.get(at)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a.shape != b.shape or not torch.equal(a, b):
                found.append(at)
        elif type(a) is not type(b) or (isinstance(a, int | float | str) and a != b):
            raise ModelError(
                f"the argument {spelled(at)} of a decoder block depends on the tokens and is no tensor "
                f"({a!r} and {b!r}); this architecture is not supported here, quantize it with rtn, without transforms"
            )
    return tuple(sorted(found, key=str))


def returned_as(number: int) -> str:
    """Under which name `Streams.shared` holds what a block has returned beside the hidden states."""
    return f"returned {number}"


@dataclass(frozen=True)
class BlockCalls:
    """The calls of one block.

    by_size: the recorded call for each number of windows. varying: places of the tensors that depend on the tokens.
    values: those tensors, by the first window of a chunk. cache_at: where the model puts a key-value cache; None: not
    looked for, or nowhere. hands: which of what this block returns beside the hidden states the next one is given.
    """

    by_size: dict[int, Call]
    varying: tuple[Place, ...] = ()
    values: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    cache_at: Place | None = None
    hands: tuple[int, ...] = ()

    def at(self, chunk: slice, windows: int, shared: Shared | None = None, cache: Any = None) -> Call:
        """The call for `windows` windows that begin where `chunk` does: with their own values of what depends on the
        tokens, and with a copy of every dictionary, filled with what earlier blocks have `shared`. cache: an object to
        call it with where the model puts its key-value cache.
        """
        call = self.by_size[windows]
        own = dict(zip(self.varying, self.values.get(chunk.start, ()), strict=False))
        beside = dict(call.beside)
        if not own and not beside and not self.mutable and cache is None:
            return call
        whole, device = windows == chunk.stop - chunk.start, self.device

        def part(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor if whole else tensor[:windows]).to(device)

        def change(at: Place, value: Any) -> Any:
            if at in own:
                return part(own[at])
            if at in beside:
                given = (shared or {}).get(returned_as(beside[at]), {})
                return part(given[0]) if 0 in given else None
            if cache is not None and at == self.cache_at:
                return cache
            if isinstance(value, MutableMapping) and len(at) > 1 and shared:
                for key, held in shared.get(spelled(at), {}).items():
                    tensors = tuple(map(part, held)) if isinstance(held, tuple) else part(held)
                    value[key] = tensors
            return value

        args, kwargs = rebuilt(_tree(call), change)
        return Call(args, kwargs, call.axis)

    @property
    def mutable(self) -> bool:
        """Whether a dictionary is among the arguments."""
        return bool(mappings(next(iter(self.by_size.values()))))

    @property
    def device(self) -> torch.device:
        """Where the tensors of the calls are."""
        tensors = (
            v for _, v in leaves(_tree(next(iter(self.by_size.values())))) if isinstance(v, torch.Tensor)
        )
        return next((t.device for t in tensors), torch.device("cpu"))


@torch.no_grad()
def record(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    ids: torch.Tensor,
    batch: int,
    device: torch.device,
    keep: Callable[[int, torch.Tensor], None] | None,
    cached: bool = False,
) -> list[BlockCalls]:
    """The calls of every block for token ids [windows, length] in chunks of `batch`.

    What lies before the blocks is loaded. keep: called with the first window of every chunk and the hidden states
    before block 0 [windows, ..., hidden]; None: they are not wanted. cached: whether the blocks will be called with a
    key-value cache; ModelError if the model hands them none.
    """
    per_size = {}
    form = block_form(model, blocks, ids[:1].to(device))
    for size in {1, batch, len(ids) % batch or batch}:
        per_size[size] = embed(model, blocks, ids[:size].to(device), form=form)[1]
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    other = embed(model, blocks, ((ids[:1] + 1) % vocabulary).to(device), form=form)[1]
    varying = [differing(call, twin) for call, twin in zip(per_size[1], other, strict=True)]
    cache_at = (
        _cache_places(model, blocks, ids[:1].to(device), per_size[1], form)
        if cached
        else [None] * len(blocks)
    )
    calls = [
        BlockCalls(
            {size: each[i] for size, each in per_size.items()},
            places,
            cache_at=cache_at[i],
            hands=tuple(sorted({number for _, number in per_size[1][i + 1].beside}))
            if i + 1 < len(blocks)
            else (),
        )
        for i, places in enumerate(varying)
    ]
    if keep is not None or any(varying):
        for number, chunk in enumerate(ids.split(batch)):
            state, own = embed(model, blocks, chunk.to(device), form=form)
            if keep is not None:
                keep(number * batch, state)
            for block, call in zip(calls, own, strict=True):
                found = dict(leaves(_tree(call))) if block.varying else {}
                block.values[number * batch] = [found[at].cpu() for at in block.varying]
    return calls


def _cache_places(
    model: PreTrainedModel, blocks: nn.ModuleList, ids: torch.Tensor, without: list[Call], form: Form
) -> list[Place | None]:
    """Where each block is given the model's key-value cache, in the calls `without` one too; ModelError if nowhere."""
    from transformers import DynamicCache

    cache = DynamicCache()
    found: list[Place | None] = []
    for number, (call, plain) in enumerate(
        zip(embed(model, blocks, ids, cache, form)[1], without, strict=True)
    ):
        places = [at for at, value in leaves(_tree(call)) if value is cache]
        if len(places) != 1 or places[0] not in dict(leaves(_tree(plain))):
            raise ModelError(
                f"{type(model).__name__} hands no key-value cache to decoder block {number}, so its cache cannot be "
                "quantized; leave kv_cache out of the recipe"
            )
        found.append(places[0])
    return found
