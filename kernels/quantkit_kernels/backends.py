"""Choose the backend of a packed linear: a table of names and the function `select`.

Only "auto" may try the next one; a backend that was named and cannot run is an error.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from quantkit_kernels.aten import AtenBackend
from quantkit_kernels.backend import Backend, BackendMissing
from quantkit_kernels.cpu.backend import CpuBackend
from quantkit_kernels.reference.backend import ReferenceBackend
from quantkit_kernels.stored import FLOATS, Spec
from quantkit_kernels.triton.backend import TritonBackend

ENVIRONMENT = "QUANTKIT_BACKEND"


class Choice(NamedTuple):
    """The chosen backend and the reason."""

    name: str
    why: str


_BACKENDS: dict[str, Backend] = {
    each.name: each for each in (CpuBackend(), TritonBackend(), AtenBackend(), ReferenceBackend())
}


def backends() -> tuple[str, ...]:
    """The names that `select` knows, "auto" aside, in the order in which "auto" tries them."""
    return tuple(_BACKENDS)


def available(name: str) -> bool:
    """Whether a backend of this name exists in this installation."""
    return name in _BACKENDS


def backend(name: str) -> Backend:
    """The backend of this name; BackendMissing lists the known ones."""
    if name not in _BACKENDS:
        raise BackendMissing(f"unknown backend {name!r}; known: auto, {', '.join(_BACKENDS)}")
    return _BACKENDS[name]


def select(
    spec: Spec,
    device: str | torch.device,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> Choice:
    """Which backend multiplies by a weight on a device, and why.

    backend: a name, or "auto" or None for what QUANTKIT_BACKEND says, else the first of the native kernels,
    PyTorch's ops and the reference that can. On a GPU "auto" first compares the kernels with the reference, once per
    process, device and scheme (`triton/selfcheck.py`). dtype: of the activations; if None, nothing runs and the answer
    is what is known. BackendMissing if a named backend is unknown or cannot run this weight here, or if none can.
    """
    device = torch.device(device)
    forced = os.environ.get(ENVIRONMENT)
    wanted, why = (forced, f"{ENVIRONMENT} says so") if backend in (None, "auto") else (backend, "asked for")
    if wanted in (None, "", "auto"):
        return _first(spec, device, dtype)
    if wanted not in _BACKENDS:
        raise BackendMissing(f"unknown backend {wanted!r} ({why}); known: auto, {', '.join(_BACKENDS)}")
    reason = _BACKENDS[wanted].refuses(spec, device)
    if reason:
        advice = "; use 'reference'" if _BACKENDS["reference"].refuses(spec, device) is None else ""
        raise BackendMissing(
            f"backend {wanted!r} ({why}) cannot run a {spec.bits}-bit [{spec.n}, {spec.k}] weight: {reason}{advice}"
        )
    return Choice(wanted, why)


def _first(spec: Spec, device: torch.device, dtype: torch.dtype | None) -> Choice:
    """The first backend that accepts the weight and passes its self-test."""
    if dtype not in (None, *FLOATS) and spec.inputs == "float":
        return Choice("reference", f"only the reference takes {dtype} activations")
    reasons: list[str] = []
    for name, each in _BACKENDS.items():
        reason = each.refuses(spec, device)
        if reason is None:
            verdict = each.verdict(spec, device, dtype)
            if verdict.trusted:
                why = verdict.why or "; ".join(reasons) or "the fastest that is built for this device"
                return Choice(name, why)
            reason = verdict.why
        reasons.append(f"not {name}: {reason}")
    raise BackendMissing(
        f"no backend runs a {spec.bits}-bit [{spec.n}, {spec.k}] weight: {'; '.join(reasons)}"
    )
