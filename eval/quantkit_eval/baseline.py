"""A baseline whose final hidden states are kept on disk, so that a later run needs only its head.

Logits over a vocabulary are too large to keep (65,536 tokens of 32,000 in fp32: 8 GB), and the likeliest of them are no
substitute. The hidden states that the head gets are smaller by vocabulary / hidden size, and the model's own code turns
them into the very same logits again: its inner model is replaced, for one call, by one that returns them. This is tried
out on each shape of batch before anything is kept; where the logits are not the same bit for bit, nothing is.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from torch import nn

from quantkit_eval.cache import Cache
from quantkit_eval.model import device_of, run
from quantkit_eval.protocols import CausalLM

_ENVIRONMENT = ("ATEN_", "DNNL_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "CUBLAS_", "NVIDIA_TF32")


class _Hidden:
    """What an inner model returns, with the final hidden states alone."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        """Caches, attentions and the like: not there."""
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]


class KeptBaseline:
    """Logits of a causal LM, from the cache where it has the hidden states of the very same batch."""

    def __init__(self, model: CausalLM, cache: Cache) -> None:
        self._model, self._cache = model, cache
        self._inner = _inner(model)
        self._prefix = fingerprint(model)
        self._exact: dict[
            tuple[int, ...], bool
        ] = {}  # shape of a batch -> whether the head gives the same bits

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[windows, context, vocabulary] of ids [windows, context]."""
        if self._inner is None:
            return run(self._model, ids)
        name = f"{self._prefix} {hashlib.sha256(ids.numpy().tobytes()).hexdigest()} {list(ids.shape)}"
        hidden = self._cache.get(name)
        if hidden is None:
            return self._run(self._inner, ids, name)
        return self._head(self._inner, ids, hidden.to(device_of(self._model)))

    def _run(self, inner: nn.Module, ids: torch.Tensor, name: str) -> torch.Tensor:
        outputs: list[Any] = []
        hook = inner.register_forward_hook(lambda module, given, out: outputs.append(out))
        try:
            logits = run(self._model, ids)
        finally:
            hook.remove()
        hidden = getattr(outputs[0], "last_hidden_state", None) if len(outputs) == 1 else None
        if isinstance(hidden, torch.Tensor):
            shape = tuple(ids.shape)
            if shape not in self._exact:
                self._exact[shape] = self._repeats(inner, ids, hidden.clone(), logits)
            if self._exact[shape]:
                self._cache.put(name, hidden)
        return logits

    def _repeats(
        self, inner: nn.Module, ids: torch.Tensor, hidden: torch.Tensor, logits: torch.Tensor
    ) -> bool:
        """Whether the hidden states alone give the logits again, bit for bit."""
        try:
            return torch.equal(self._head(inner, ids, hidden), logits)
        except Exception:  # the model's own code wants more of its inner model than these
            return False

    def _head(self, inner: nn.Module, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The logits that the model makes of final hidden states."""
        inner.forward = lambda *args, **options: _Hidden(hidden)
        try:
            return run(self._model, ids)
        finally:
            del inner.forward  # the class has its own


def _inner(model: CausalLM) -> nn.Module | None:
    """The module whose output the head gets; None if it is not known, or its forward is not the class's own."""
    found: Any = getattr(model, "base_model", None)
    quantized = (
        getattr(model.config, "quantization_config", None) is not None
    )  # its kernels are not in `fingerprint`
    if not isinstance(found, nn.Module) or found is model or quantized:
        return None
    return None if "forward" in vars(found) or "forward" in vars(model) else found


def fingerprint(model: CausalLM) -> str:
    """Digest of all that decides the last bits of a model's logits beside its files and the processor's name.

    The model's class, dtype, attention and device; torch and its libraries, threads and settings; transformers.
    """
    import transformers

    device = device_of(model)
    facts = [
        f"{type(model).__module__}.{type(model).__qualname__}",
        getattr(model, "dtype", None),
        getattr(model.config, "_attn_implementation", None),
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        transformers.__version__,
        torch.__version__,
        torch.__config__.show(),
        torch.__config__.parallel_info(),
        torch.backends.cpu.get_cpu_capability(),
        torch.backends.mkldnn.enabled,
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device.type),
        sorted(item for item in os.environ.items() if item[0].startswith(_ENVIRONMENT)),
    ]
    return hashlib.sha256(repr([str(fact) for fact in facts]).encode()).hexdigest()
