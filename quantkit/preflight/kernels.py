"""Which kernels an engine has for a scheme: on which devices, and for which shards."""

from __future__ import annotations

from collections.abc import Iterable

from quantkit.preflight.foreign import taken
from quantkit.preflight.subject import Finding, Linear
from quantkit.preflight.tables import KERNELS, Kernel, Reading, source
from quantkit.preflight.target import DEVICES, Device, Target
from quantkit.scheme import Scheme

# (number, what its scales are) -> the family
_SHORT = {
    ("fp4_e2m1", "fp8_e4m3"): "nvfp4",
    ("fp4_e2m1", "e8m0"): "mxfp4",
    ("fp8_e4m3", "e8m0"): "mxfp8",
}
_GROUPS = (128, 64, 32, None)


def family_of(scheme: Scheme) -> str | None:
    """The kind of kernel that a scheme needs, as `Kernel.family` names it; None if engines have no such kind.

    The order of vLLM's `_get_scheme_from_parts` (compressed_tensors.py).
    """
    grid, inputs = scheme.weights, scheme.inputs
    if grid.scale is not None:
        kind = _SHORT.get((grid.number.name, grid.scale))
        if kind is None or inputs is None:
            return kind
        alike = (inputs.number, inputs.scale) == (grid.number, grid.scale)
        return f"{kind} inputs" if alike else None
    if grid.number.name == "fp8_e4m3":
        if inputs is None:
            return "fp8 weights"
        if inputs.number.kind != "float" or (inputs.granularity == "group") != (grid.granularity == "block"):
            return None
        if grid.granularity == "block":
            return "fp8 block"
        return "fp8 tensor" if not inputs.dynamic else "fp8 token"
    if grid.number.kind != "int":
        return None
    if inputs is None:
        return "integers" if grid.granularity in ("channel", "group") else None
    if inputs.number.kind != "int" or not grid.symmetric or inputs.granularity not in ("token", "tensor"):
        return None
    if grid.bits == 8 and grid.granularity in ("channel", "tensor"):
        return "int8 inputs"
    four = grid.bits == 4 and inputs.dynamic and grid.granularity in ("channel", "group")
    return "int4, int8 inputs" if four else None


def kernels_for(scheme: Scheme, engine: str, device: Device, reading: Reading | None = None) -> list[Kernel]:
    """The kernels of an engine that run a scheme on a kind of device, in its order of preference.

    reading: how it reads the files of another tool that the weights are stored in.
    """
    family, grid = family_of(scheme), scheme.weights

    def taking(kernels: Iterable[Kernel]) -> list[Kernel]:
        fitting = [kernel for kernel in kernels if kernel.runs_on(device)]
        return [kernel for kernel in fitting if kernel.takes(grid.bits, grid.symmetric, grid.group_size)]

    found = taking(kernel for kernel in KERNELS if (kernel.engine, kernel.family) == (engine, family))
    if reading is None:
        return found
    if (grid.bits, grid.symmetric) in reading.alone:
        return taking(reading.own)
    return found + taking(reading.own) if reading.anyhow or not found else found


def devices_for(scheme: Scheme, engine: str, optional: bool = True) -> list[str]:
    """The kinds of device on which an engine runs a scheme; optional: also with its optional packages."""
    return [
        name
        for name, device in DEVICES.items()
        if any(optional or kernel.needs is None for kernel in kernels_for(scheme, engine, device))
    ]


def needed(schemes: Iterable[Scheme], target: Target, reading: Reading | None = None) -> list[str]:
    """The optional packages without which the target runs one of these schemes on none of its devices."""
    found: dict[str, None] = {} if reading is None or reading.needs is None else {reading.needs: None}
    for scheme in schemes:
        each = [
            kernel
            for device in target.devices
            for kernel in kernels_for(scheme, target.engine, device, reading)
        ]
        if each and all(kernel.needs for kernel in each):
            found |= {str(kernel.needs): None for kernel in each}
    return list(found)


def no_kernel(
    linear: Linear, shard: tuple[int, int], target: Target, reading: Reading | None = None
) -> Finding | None:
    """Why none of the target's devices runs a linear, whose part on one device is `shard`; None if one does.

    reading: how it reads the files of another tool that the linear is stored in.
    """
    scheme, engine = linear.scheme, target.engine
    if scheme is None or engine not in ("vllm", "sglang"):
        return None
    devices = target.devices if reading is None else taken(linear, reading, target)
    if isinstance(devices, Finding):
        return devices
    kernels = [kernel for device in devices for kernel in kernels_for(scheme, engine, device, reading)]
    if any(kernel.fits(*shard) for kernel in kernels):
        return None
    if kernels:
        tiles = "; ".join(dict.fromkeys(f"{k.name} takes N % {k.rows} and K % {k.columns}" for k in kernels))
        file = kernels[0].file
        said = f"{linear.scheme} as {shard[0]} x {shard[1]} is not whole tiles there ({tiles})"
        return Finding(
            "kernel", "", f"{said}: {target}", "skip this layer, or use fewer devices", source(engine, file)
        )
    return _finding(linear, "no kernel", target, _others(scheme, engine, target), _file(scheme, engine))


def _finding(linear: Linear, why: str, target: Target, others: tuple[str, ...], file: str) -> Finding:
    remedy = f"use {' or '.join(others)}" if others else "use another preset or another engine"
    return Finding(
        "kernel", "", f"{linear.scheme} has {why} in {target}", remedy, source(target.engine, file)
    )


def _file(scheme: Scheme, engine: str) -> str:
    family = family_of(scheme)
    files = [kernel.file for kernel in KERNELS if kernel.engine == engine and kernel.family == family]
    return (
        files[0] if files else "model_executor/layers/quantization/compressed_tensors/compressed_tensors.py"
    )


def _others(scheme: Scheme, engine: str, target: Target) -> tuple[str, ...]:
    """What runs instead: another device for the scheme, or other bits and groups on these devices."""
    found = []
    devices = devices_for(scheme, engine)
    if devices:
        found.append(f"gpu: {', '.join(devices)}")
    grid = scheme.weights
    if family_of(scheme) == "integers":
        for bits, even in ((grid.bits, grid.symmetric), (grid.bits, True), (4, grid.symmetric), (4, True)):
            sizes = [
                size or "channel"
                for size in _GROUPS
                if any(
                    kernel.takes(bits, even, size)
                    for device in target.devices
                    for kernel in KERNELS
                    if (kernel.engine, kernel.family) == (engine, "integers") and kernel.runs_on(device)
                )
            ]
            if sizes:
                shown = ", ".join(map(str, sizes))
                found.append(f"bits: {bits}, symmetric: {str(even).lower()}, group_size: {shown}")
                break
    elif not devices:
        found.append("W4A16, W8A8 or FP8_DYNAMIC")
    else:
        found += [
            name
            for name, kind in (("W8A8", "int8 inputs"), ("FP8_DYNAMIC", "fp8 token"), ("W4A16", "integers"))
            if any(
                (kernel.engine, kernel.family) == (engine, kind) and kernel.runs_on(device)
                for device in target.devices
                for kernel in KERNELS
            )
        ][:1]
    return tuple(found)
