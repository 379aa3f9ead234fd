"""Checkpoints of other tools: whether an engine reads their files at all, and what of them it does not take.

The tensors of a linear in such a file have rules of their own, beside those of its shape and of tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantkit.formats.foreign import METHODS
from quantkit.preflight.subject import Finding, Linear, Subject
from quantkit.preflight.tables import READERS, READINGS, Reading, source
from quantkit.preflight.target import NAMES, Device, Target

OWN = "compressed-tensors"


def format_of(subject: Subject) -> str | None:
    """The format of another tool that the quantized linears of a checkpoint are stored in; None for our own."""
    found = next((linear.format for linear in subject.quantized if linear.format != OWN), None)
    packing = str(subject.quantization.get("packing_format", ""))
    return f"{found} awq" if found == "auto-round" and packing.endswith("awq") else found


def reading_of(subject: Subject, target: Target) -> Reading | None:
    """How the target reads the files of another tool; None for our own, and if it does not read them."""
    return READINGS.get(target.engine, {}).get(format_of(subject) or "")


def unread(subject: Subject, target: Target) -> Finding | None:
    """What to say of a target that has no reader of these files."""
    kind = format_of(subject)
    if kind is None or target.engine == "quantkit" or reading_of(subject, target) is not None:
        return None
    tool = METHODS.get(kind.removesuffix(" awq"), kind)
    others = ", ".join(NAMES[engine] for engine, rows in READINGS.items() if kind in rows)
    return Finding(
        "format",
        "",
        f"{NAMES[target.engine]} has no reader of files by {tool}",
        f"serve it with {others}{' or ' if others else ''}quantkit, or quantize the original model with quantkit",
        source(target.engine, READERS[target.engine]),
    )


def settings(subject: Subject, target: Target) -> Iterator[Finding]:
    """What the config of another tool's checkpoint says that the target refuses, or does not say that it needs."""
    reading, config = reading_of(subject, target), subject.quantization
    if reading is None:
        return
    where = source(target.engine, reading.file)
    if missing := [keys[0] for keys in reading.keys if not any(key in config for key in keys)]:
        numbers = f"quantization_config lacks {', '.join(missing)}, which {NAMES[target.engine]} asks for"
        yield Finding("config", "", numbers, "add what the files were made with", where)
    takes_order = any(device.capability is not None and reading.ordered for device in target.devices)
    size = _ordered(subject)
    if size is not None and not takes_order and target.engine != "transformers":
        numbers = f"desc_act with groups of {size}: columns out of order are not taken by {target}"
        remedy = "quantize with desc_act: false, or serve it with quantkit"
        yield Finding("order", "", numbers, remedy, where)
    if target.engine == "transformers" and format_of(subject) == "gptq":
        yield from _gptqmodel(config, where)


def _ordered(subject: Subject) -> int | None:
    """The group size of GPTQ's columns out of order; None if there are no such groups."""
    config, rules = subject.quantization, subject.quantization.get("dynamic")
    own_rules = rules.items() if isinstance(rules, Mapping) else ()
    for own in (config, *(own for name, own in own_rules if not name.startswith("-:"))):
        if isinstance(own, Mapping) and own.get("desc_act", config.get("desc_act")):
            size = own.get("group_size", config.get("group_size", 128))
            if isinstance(size, int) and size != -1:
                return size
    return None


def _gptqmodel(config: Mapping[str, object], where: str) -> Iterator[Finding]:
    """What transformers with gptqmodel gets wrong."""
    dynamic = config.get("dynamic")
    if isinstance(dynamic, Mapping) and any(not name.startswith("-:") for name in dynamic):
        numbers = "`dynamic` gives single layers other bits or groups, which it does not look at"
        yield Finding("config", "", numbers, "serve it with vLLM or quantkit", where)
    version, meta = config.get("checkpoint_format", "gptq"), config.get("meta")
    made = meta.get("quantizer") if isinstance(meta, Mapping) else None
    if config.get("sym") is False and version == "gptq" and "gptqmodel" not in str(made):
        numbers = (
            "asymmetric weights in checkpoint_format gptq, which it takes from gptqmodel 0.9 or later only"
        )
        yield Finding("config", "", numbers, "store them as gptq_v2, or serve with quantkit", where)


def taken(linear: Linear, reading: Reading, target: Target) -> tuple[Device, ...] | Finding:
    """The devices of the target on which it reads the bits and groups of a linear, or what it does not read."""
    assert linear.scheme is not None
    grid, where = linear.scheme.weights, source(target.engine, reading.file)
    if grid.number.kind != "int":
        return target.devices
    kind = (grid.bits, grid.symmetric)
    rows = {device: reading.cpu if device.capability is None else reading.kinds for device in target.devices}
    able = tuple(device for device, kinds in rows.items() if kind in kinds)
    if not able:
        read = sorted({each for kinds in rows.values() for each in kinds})
        known = ", ".join(f"{bits} bits {'symmetric' if even else 'asymmetric'}" for bits, even in read)
        said = f"{linear.scheme} in {linear.format} files, of which it reads {known or 'nothing'}: {target}"
        return Finding("kernel", "", said, "use compressed-tensors or another scheme", where)
    if reading.groups is not None and grid.group_size not in reading.groups:
        sizes = ", ".join(str(size or "channel") for size in reading.groups)
        said = f"{linear.scheme} in {linear.format} files, of which it reads group_size {sizes}: {target}"
        return Finding("kernel", "", said, "use compressed-tensors or another group size", where)
    return able
