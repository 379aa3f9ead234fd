"""What the model's own forward does around its decoder blocks.

It computes everything before them (embeddings, masks, rotary tables) and after them (final norm, head): the blocks'
`forward` is patched to record its call and pass the hidden states through. So nothing here knows an architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from quantkit.calibration.returned import FIRST, Form, laid, seen_on_meta, stacked, wrapped
from quantkit.calibration.trees import Place, leaves, rebuilt
from quantkit.errors import ModelError
from quantkit.models.skeleton import reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a forward raises that was not written for this walk.
_FORWARD_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Stop(Exception):
    """Raised inside a forward that has shown what it was run for."""


@dataclass(frozen=True)
class Call:
    """How the model called a block: everything but the hidden states. axis: which of theirs counts the windows.

    beside: where it stands in (args, kwargs), and which one it is, of what the block before returned beside the hidden
    states and the model hands on; None stands in its place.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    axis: int = 0
    beside: tuple[tuple[Place, int], ...] = ()

    def __call__(self, module: nn.Module, hidden: torch.Tensor) -> Any:
        """What `module` returns for hidden states [windows, ...]."""
        return module(laid(hidden, self.axis), *self.args, **self.kwargs)


@contextmanager
def refusing(where: str, instead: str = "quantize it with rtn, without transforms") -> Iterator[None]:
    """An error inside a forward becomes a ModelError that names `where` and the innermost module that was running."""
    running: list[str] = []

    def enter(module: nn.Module, args: object) -> None:
        running.append(type(module).__name__)

    def leave(module: nn.Module, args: object, out: object) -> None:
        running.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _FORWARD_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{where}: {running[-1] if running else 'the model'} does not run block by block: "
            f"{type(error).__name__}: {reason}; this architecture is not supported here, {instead}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def patched(modules: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace `forward` of modules on the instance."""
    done = []
    try:
        for module, forward in modules:
            module.forward = forward
            done.append(module)
        yield
    finally:
        for module in done:
            del module.forward


def _reader(model: PreTrainedModel) -> PreTrainedModel:
    """What is called with token ids; ModelError if it wants more than that."""
    part = reader(model)
    given = inspect.signature(part.forward).parameters.values()
    wants = [p.name for p in given if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if beside := [name for name in wants if name != "input_ids"]:
        raise ModelError(
            f"{type(model).__name__} does not run on a text alone, its forward wants {', '.join(beside)}; quantize it "
            "with rtn, without transforms"
        )
    return part


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Call((), rest)


def embed(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    ids: torch.Tensor,
    cache: Any = None,
    form: Form = FIRST,
) -> tuple[torch.Tensor, list[Call]]:
    """Hidden states [windows, ..., hidden] before block 0, and the call of every block, for such token ids.

    cache: a key-value cache that the model is to hand to its blocks; None: it uses none. form: see `block_form`.
    """
    if form.values is not None and form.values[1] > 1:
        try:
            hidden, calls = _embed(model, blocks, ids, cache, form, marked=True)
        except ModelError:  # a model that looks at what its blocks return beside the hidden states
            pass
        else:
            return hidden, [_unmarked(call) for call in calls]
    return _embed(model, blocks, ids, cache, form)


@dataclass(frozen=True)
class _Beside:
    """Stands for what a block returns beside the hidden states, to see whether the next one is given it."""

    number: int


def _unmarked(call: Call) -> Call:
    """The call with None for every `_Beside`, and with their places."""
    tree = (call.args, call.kwargs)
    beside = tuple((at, value.number) for at, value in leaves(tree) if isinstance(value, _Beside))
    if not beside:
        return call
    args, kwargs = rebuilt(tree, lambda at, value: None if isinstance(value, _Beside) else value)
    return replace(call, args=args, kwargs=kwargs, beside=beside)


@torch.no_grad()
def _embed(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    ids: torch.Tensor,
    cache: Any,
    form: Form,
    marked: bool = False,
) -> tuple[torch.Tensor, list[Call]]:
    """See `embed`. marked: whether blocks return a `_Beside` in place of everything but the hidden states."""
    given = {} if cache is None else {"past_key_values": cache}
    hidden: list[torch.Tensor] = []
    calls: list[Call] = []

    def record(*args: object, **kwargs: object) -> Any:
        h, call = _split(args, kwargs)
        hidden.append(h)
        calls.append(replace(call, axis=form.axis))
        if len(calls) == len(blocks):
            raise Stop
        out = wrapped(h, form.values)
        if marked:
            out = type(out)([h, *map(_Beside, range(1, len(out)))])
        return out

    with refusing(type(model).__name__), patched((b, record) for b in blocks):
        try:
            _reader(model)(input_ids=ids, use_cache=cache is not None, **given)
        except Stop:
            if hidden[0].dim() < 3 or hidden[0].shape[form.axis] != len(ids):
                raise ValueError(
                    f"its blocks take hidden states of shape {list(hidden[0].shape)} for {list(ids.shape)} tokens"
                ) from None
            return stacked(hidden[0], form.axis), calls
        raise RuntimeError(f"the forward ran {len(calls)} of {len(blocks)} decoder blocks")


@torch.no_grad()
def block_form(model: PreTrainedModel, blocks: nn.ModuleList, ids: torch.Tensor) -> Form:
    """How the blocks take and return their hidden states, which a model unpacks; the first one is run without weights.

    ids: of one window. Hidden states alone, windows first, where that is not found out. ModelError if the model does
    not hand the hidden states from block to block as they are, each block once. What is outside the blocks is loaded.
    """
    try:
        hidden, call = _first_call(model, blocks, ids)
        form = Form(seen_on_meta(blocks[0], hidden, call))
        two, _ = _first_call(model, blocks, ids.expand(2, -1))
    except _FORWARD_ERRORS:  # `embed` meets it too, and says it by name
        return FIRST
    changed = [axis for axis, (a, b) in enumerate(zip(hidden.shape, two.shape, strict=False)) if 2 * a == b]
    form = replace(form, axis=changed[0] if len(changed) == 1 else 0)
    with refusing(type(model).__name__):
        _check_order(model, blocks, ids, form)
    return form


def _first_call(
    model: PreTrainedModel, blocks: nn.ModuleList, ids: torch.Tensor
) -> tuple[torch.Tensor, Call]:
    """(hidden states as block 0 takes them, the call it gets); RuntimeError if it is not reached."""
    first: list[tuple[torch.Tensor, Call]] = []

    def stop(*args: object, **kwargs: object) -> None:
        first.append(_split(args, kwargs))
        raise Stop

    with patched([(blocks[0], stop)]), suppress(Stop):
        _reader(model)(input_ids=ids, use_cache=False)
    if not first:
        raise RuntimeError("the forward does not reach its first decoder block")
    return first[0]


def _check_order(model: PreTrainedModel, blocks: nn.ModuleList, ids: torch.Tensor, form: Form) -> None:
    """ValueError if hidden states do not go through the blocks one after the other, once, unchanged in between."""
    seen: list[tuple[int, torch.Tensor]] = []

    def passing(index: int) -> Callable[..., Any]:
        def forward(*args: object, **kwargs: object) -> Any:
            hidden = _split(args, kwargs)[0]
            seen.append((index, hidden.clone()))
            return wrapped(hidden, form.values)

        return forward

    try:
        with patched((block, passing(i)) for i, block in enumerate(blocks)):
            _reader(model)(input_ids=ids, use_cache=False)
    except _FORWARD_ERRORS:  # the head has no weights; before the last block `embed` meets the error too
        pass
    order = [index for index, _ in seen]
    if len(order) >= len(blocks) and order != list(range(len(blocks))):
        raise ValueError(f"it runs its blocks in the order {', '.join(map(str, order[: len(blocks) + 4]))}")
    for (_, one), (index, other) in pairwise(seen):
        if not torch.equal(one, other):
            raise ValueError(f"it changes the hidden states before block {index}")


@torch.no_grad()
def finish(
    model: PreTrainedModel, blocks: nn.ModuleList, hidden: torch.Tensor, ids: torch.Tensor, form: Form
) -> torch.Tensor:
    """Logits from hidden states [windows, ...] behind the last block: final norm and head by the model's own forward.

    form: how the blocks return their hidden states.
    """

    def give(*args: object, **kwargs: object) -> object:
        return form.returning(hidden)

    with patched((b, give) for b in blocks):
        logits: torch.Tensor = _reader(model)(input_ids=ids, use_cache=False).logits
        return logits
