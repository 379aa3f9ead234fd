"""List the built kernels, the instruction sets of the machine, and the backend for each scheme. Nothing is timed."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
from typing import Any, NamedTuple

import quantkit_kernels
import torch
from quantkit_kernels import Spec
from quantkit_kernels.backends import ENVIRONMENT
from quantkit_kernels.cpu.library import ADVICE, SLOWER

BITS = range(2, 9)
GROUPS: tuple[int | None, ...] = (32, 64, 128, None)
# Weights that are no integers, or whose inputs are rounded: (number, bits, group size, inputs).
FORMATS: dict[str, tuple[str, int, int | None, str]] = {
    "FP8, channel": ("fp8_e4m3", 8, None, "float"),
    "FP8, blocks of 128": ("fp8_e4m3", 8, 128, "float"),
    "NVFP4": ("fp4_e2m1", 4, 16, "float"),
    "MXFP4": ("fp4_e2m1", 4, 32, "float"),
    "NF4, groups of 64": ("nf4", 4, 64, "float"),
    "W8A8 int8": ("int8", 8, None, "int8-range"),
    "W4A8, groups of 128": ("int4", 4, 128, "int8-range"),
    "W8A8 FP8": ("fp8_e4m3", 8, None, "fp8-range"),
    "W8A8 FP8, blocks of 128": ("fp8_e4m3", 8, 128, "fp8-group"),
}
NOT_BUILT = f"not built: PyTorch's ops or the reference run, and {SLOWER}; {ADVICE}"


def inventory(n: int, k: int, backend: str | None = None) -> dict[str, Any]:
    """The report of `quantkit kernels` for a weight [N, K]: {"built": {part: description}, "schemes", "formats"}."""
    schema, rows = "quantkit-inventory/1", schemes(n, k, backend)
    return {"schema": schema, "built": built(), "schemes": rows, "formats": formats(n, k, backend)}


def built() -> dict[str, str]:
    """One line of description for each part."""
    forced = os.environ.get(ENVIRONMENT)
    return {
        "native CPU library": native(),
        "attention over quantized KV caches, on the CPU": _kv_pages(),
        "Triton": _triton(),
        "CUDA": _cuda(),
        "PyTorch": f"{torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}",
        "backends": ", ".join(quantkit_kernels.backends()) + (f" ({ENVIRONMENT}={forced})" if forced else ""),
    }


def native() -> str:
    """Describe the native CPU library: the path in use, others that this machine could run, and those it cannot."""
    try:
        from quantkit_kernels.cpu import library
    except ImportError:
        return NOT_BUILT
    if not library.available():
        return NOT_BUILT
    try:
        running = library.isa()
    except RuntimeError as error:
        return f"built, but {error}"
    return describe_native(library.required(), running)


def describe_native(library: ctypes.CDLL, running: str) -> str:
    """Describe a loaded library; `running` is the path in use."""
    names = {isa: library.qk_isa_name(isa).decode() for isa in range(4)}
    can = [name for isa, name in names.items() if library.qk_isa_available(isa) > 0]
    lacks = [name for name in names.values() if name not in can]
    forced = os.environ.get("QUANTKIT_ISA")
    return (
        f"built; runs {running}{f' (QUANTKIT_ISA={forced})' if forced else ''}; possible here: {', '.join(can)}"
        + (f"; built, but not for this machine: {', '.join(lacks)}" if lacks else "")
        + f"; processor: {library.qk_cpu_flags().decode()}"
    )


def _kv_pages() -> str:
    """What reads a quantized cache inside transformers, and why."""
    from quantkit_kernels.cpu.kv_pages import runs_on

    try:
        name, why = runs_on(torch.device("cpu"))
    except RuntimeError as error:
        return f"none: {error}"
    return f"{name}, {why}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    return importlib.metadata.version("triton")


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device"
    devices = range(torch.cuda.device_count())
    return ", ".join(
        "{} (sm_{}{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in devices
    )


def schemes(n: int, k: int, backend: str | None = None) -> list[dict[str, Any]]:
    """What `quantkit_kernels.select` answers, with one row for all schemes that get the same answer.

    Row: device, bits [..], groups [..], zero_point ("none", "stored" or "any"), runs (None if nothing can), why (of
    the first of them: numbers in it may differ). The device need not be present.
    """
    rows = []
    for device in ("cpu", "cuda"):
        alike: dict[Any, tuple[list[int], dict[str, _Answer]]] = {}
        for bits in BITS:
            answers = _answers(device, bits, n, k, backend)
            key = tuple((pattern, tuple(answer.schemes)) for pattern, answer in answers.items())
            alike.setdefault(key, ([], answers))[0].append(bits)
        for all_bits, answers in alike.values():
            for answer in answers.values():
                for zero_point, groups in answer.by_zero_point():
                    row = {"device": device, "bits": all_bits, "groups": groups, "zero_point": zero_point}
                    rows.append(row | {"runs": answer.runs, "why": answer.why})
    return rows


def formats(n: int, k: int, backend: str | None = None) -> list[dict[str, Any]]:
    """What `select` answers for the weights of FORMATS. Row: format, device, runs, why."""
    rows = []
    for device in ("cpu", "cuda"):
        for name, (number, bits, group, inputs) in FORMATS.items():
            if k % (group or k) == 0:
                spec = Spec(number, bits, group or k, True, n, k, inputs)
                runs, why = _ask(device, spec, backend)
                if runs is None and inputs != "float":  # what a layer does then
                    runs, _ = _ask(device, spec.with_inputs("float"), backend)
                    why = f"inputs are rounded before the product: {why}"
                rows.append({"format": name, "device": device, "runs": runs, "why": why})
    return rows


class _Answer(NamedTuple):
    """One backend and its reason, for some (group, symmetric) at one bit width."""

    runs: str | None
    why: str
    schemes: list[tuple[int | None, bool]]

    def by_zero_point(self) -> list[tuple[str, list[str]]]:
        """[("any", groups), ..]: the groups with both kinds of zero points, then those with one."""
        kinds = {group: {s for g, s in self.schemes if g == group} for group, _ in self.schemes}
        names = (("any", {True, False}), ("none", {True}), ("stored", {False}))
        found = [(name, [str(g or "channel") for g in kinds if kinds[g] == kind]) for name, kind in names]
        return [(name, groups) for name, groups in found if groups]


def _answers(device: str, bits: int, n: int, k: int, backend: str | None) -> dict[str, _Answer]:
    """Answers grouped by backend and reason; reasons that differ only in numbers or zero points count as equal."""
    found: dict[str, _Answer] = {}
    for group in GROUPS:
        if k % (group or k):
            continue
        for symmetric in (True, False):
            runs, why = _ask(device, Spec.integer(bits, group, symmetric, n, k), backend)
            pattern = re.sub(r"\d+", "#", f"{runs} {why}").replace("asymmetric", "symmetric")
            found.setdefault(pattern, _Answer(runs, why, [])).schemes.append((group, symmetric))
    return found


def _ask(device: str, spec: Spec, backend: str | None) -> tuple[str | None, str]:
    try:
        name, why = quantkit_kernels.select(spec, device, backend)
    except quantkit_kernels.BackendMissing as error:
        return None, str(error)
    return name, why
