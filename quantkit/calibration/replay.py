"""The memory of a block's finished parts: an attention or MLP whose weights are final need not run again.

Only the input of its last linear is kept. That linear runs once more, with its final weight; its output takes the place
of the input and serves every later pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from quantkit.calibration.returned import Returned, returned, wrapped
from quantkit.structure.trace import Trace

# Bytes of inputs kept: at least KEPT_BYTES, and what the matrices of the widest linear (H, its factor, the drift) leave
# of SPARE_BYTES.
KEPT_BYTES, SPARE_BYTES = 128 << 20, 480 << 20


class Replay:
    """Inputs and outputs kept for one block, by stream and chunk.

    widest: in_features of the block's widest planned linear. enabled: False for a block that also hands on something
    from inside (shared keys and values), which a replayed part would not compute. most: bytes that are kept; None: as
    many as usual.
    """

    def __init__(
        self, block: nn.Module, trace: Trace, widest: int, enabled: bool = True, most: int | None = None
    ) -> None:
        self.block, self.enabled = block, enabled
        self.budget = max(KEPT_BYTES, SPARE_BYTES - 3 * 4 * widest**2) if most is None else most
        self._inputs: dict[tuple[bool, str], dict[int, torch.Tensor]] = {}
        self._outputs: dict[tuple[bool, str], dict[int, torch.Tensor]] = {}
        self._last = {linear: name for name, linear in trace.output_of.items()}  # last linear -> its module
        self._order = trace.siblings
        self._returned: dict[str, Returned] = {}  # (tuple or list, its length), or a tensor alone
        self._done: set[str] = set()
        for name in trace.output_of:
            block.get_submodule(name).register_forward_hook(self._note_returned(name))

    def _note_returned(self, name: str) -> Callable[..., Any]:
        forms = self._returned  # and not self: the hook stays with the module, which self holds

        def hook(module: nn.Module, args: object, out: object) -> None:
            forms.setdefault(name, returned(out))

        return hook

    def finished(self, names: Iterable[str]) -> None:
        """These linears have their final weights: their parents may be replayed."""
        self._done.update(names)

    def keep(self, siblings: tuple[str, ...], chunk: slice, full: bool, x: torch.Tensor) -> None:
        """Keep the input of a linear whose output is its parent's, while the budget lasts."""
        linear = siblings[0]
        if not self.enabled or len(siblings) != 1 or linear not in self._last:
            return
        before = self._order[: self._order.index(siblings)]
        if not full and not all(name in self._done for each in before for name in each):
            return  # collected together with what it reads, which will have other weights
        stores = (*self._inputs.values(), *self._outputs.values())
        used = sum(t.nbytes for store in stores for t in store.values())
        if used + x.nbytes <= self.budget:
            self._inputs.setdefault((full, linear), {})[chunk.start] = x

    def forwards(self, chunk: slice, full: bool) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """(module, forward) of every finished part that need not run for this chunk and stream."""
        found = []
        for linear, name in self._last.items():
            at = (full, linear)
            inputs, outputs = self._inputs.get(at, {}), self._outputs.setdefault(at, {})
            if linear not in self._done or name not in self._returned:
                continue
            if chunk.start not in outputs:
                if chunk.start not in inputs:
                    continue
                outputs[chunk.start] = self.block.get_submodule(linear)(inputs.pop(chunk.start))

            def replay(
                *args: object, to: str = name, out: torch.Tensor = outputs[chunk.start], **kw: object
            ) -> object:
                return wrapped(out.clone(), self._returned[to])  # a clone, as a model may add to it in place

            found.append((self.block.get_submodule(name), replay))
        return found

    def clear(self) -> None:
        """Let go of everything that was kept."""
        self._inputs.clear()
        self._outputs.clear()
