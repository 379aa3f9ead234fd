"""Tensor parallelism: what one device gets of each linear, and what does not divide.

Read in vLLM 0.32: config/model.py (heads), model_executor/layers/linear.py (rows and columns), distributed/utils.py
(groups in a shard), layers/quantization/utils/fp8_utils.py (blocks), model_executor/parameter.py (packed zero points).
"""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.preflight.subject import Finding, Linear, Subject
from quantkit.preflight.tables import FUSIONS, KEY_VALUES, REPLICATED, ROW_PARALLEL, source
from quantkit.preflight.target import Target

_GROUPS = (128, 64, 32)
_HEADS, _KV_HEADS = ("num_attention_heads", "n_head"), ("num_key_value_heads", "num_kv_heads")
_LINEAR = "model_executor/layers/linear.py"


def heads(subject: Subject, target: Target) -> Iterator[Finding]:
    """Attention heads and heads of keys and values that the devices cannot share out."""
    width = target.tensor_parallel
    queries = subject.count(*_HEADS)
    if queries and queries % width:
        yield Finding(
            "heads",
            "",
            f"{queries} attention heads do not divide by tensor_parallel {width}",
            f"use tensor_parallel: {_widths(queries, width)}",
            source(target.engine, "config/model.py"),
        )
    pairs = subject.count(*_KV_HEADS) or queries
    if pairs and pairs % width and width % pairs:
        fitting = [n for n in range(1, width) if pairs % n == 0 or n % pairs == 0]
        yield Finding(
            "heads",
            "",
            f"{pairs} heads of keys and values neither divide by tensor_parallel {width} nor into it",
            f"use tensor_parallel: {fitting[-1]}",
            source(target.engine, _LINEAR),
        )


def shard_of(linear: Linear, subject: Subject, width: int) -> tuple[int, int] | None:
    """[n, k] of a linear on one of `width` devices; None if it does not divide."""
    n, k = linear.shape
    if width == 1 or linear.leaf in REPLICATED:
        return n, k
    if linear.leaf in ROW_PARALLEL:
        return (n, k // width) if k % width == 0 else None
    pairs = subject.count(*_KV_HEADS) or subject.count(*_HEADS)
    if linear.leaf in KEY_VALUES and pairs and width > pairs and n % pairs == 0:
        return n // pairs, k  # every device holds a copy of one head
    return (n // width, k) if n % width == 0 else None


def splits(linear: Linear, subject: Subject, target: Target) -> Iterator[Finding]:
    """What of a quantized linear does not divide: its rows or columns, its groups, blocks and packed zero points."""
    assert linear.scheme is not None
    width, (n, k) = target.tensor_parallel, linear.shape
    shard = shard_of(linear, subject, width)
    if shard is None:
        what = f"in_features {k}" if linear.leaf in ROW_PARALLEL else f"out_features {n}"
        size = k if linear.leaf in ROW_PARALLEL else n
        numbers = f"{what} does not divide by tensor_parallel {width}"
        yield _finding("split", numbers, f"use tensor_parallel: {_widths(size, width)}", target, _LINEAR)
        return
    yield from _groups(linear, shard, target)
    if linear.scheme.weights.granularity == "block":
        yield from _blocks(linear, shard, target)
    grid = linear.scheme.weights
    shared = width > 1 or _merged(linear, subject)
    if linear.scheme.inputs is None and not grid.symmetric and shared and shard[0] * grid.bits % 32:
        yield _finding(
            "zero points",
            f"{shard[0]} rows a device of {grid.bits}-bit zero points are not whole 32-bit words",
            "use symmetric: true" + (" or fewer devices" if width > 1 else ""),
            target,
            "model_executor/parameter.py",
        )


def _groups(linear: Linear, shard: tuple[int, int], target: Target) -> Iterator[Finding]:
    """Groups of columns that end in another device's part."""
    assert linear.scheme is not None
    grid, width, k = linear.scheme.weights, target.tensor_parallel, linear.shape[1]
    size = grid.group_size
    if size is None or shard[1] % size == 0 or grid.granularity == "block":
        return
    sizes = [g for g in _GROUPS if g < size and shard[1] % g == 0] if grid.number.kind == "int" else []
    wanted = f"group_size {', '.join(map(str, [*sizes, 'channel']))}" if grid.number.kind == "int" else ""
    fewer = [n for n in range(1, width) if k % n == 0 and k // n % size == 0]
    remedies = [wanted] if wanted else []
    remedies += [f"tensor_parallel: {fewer[-1]}"] if fewer else []
    split = f" / tensor_parallel {width} = {shard[1]}" if shard[1] != k else ""
    yield _finding(
        "groups",
        f"in_features {k}{split} is not whole groups of {size}",
        f"use {' or '.join(remedies) or 'another preset'}, or a rule that skips this layer",
        target,
        "distributed/utils.py",
    )


def _blocks(linear: Linear, shard: tuple[int, int], target: Target) -> Iterator[Finding]:
    """Blocks of rows and columns that two devices, or two fused linears, would share."""
    assert linear.scheme is not None
    size, width = linear.scheme.weights.group_size or 0, target.tensor_parallel
    by_columns = linear.leaf in ROW_PARALLEL
    part = shard[1] if by_columns else shard[0]
    followed = any(linear.leaf in fusion.parts[:-1] for fusion in FUSIONS if not fusion.types)
    if part % size == 0 or (width == 1 and (by_columns or not followed)):
        return
    what = "columns" if by_columns else "rows"
    why = f"of one of {width} devices" if width > 1 else "before the next linear that is fused with it"
    remedy = "use preset: FP8_DYNAMIC" + (", or fewer devices" if width > 1 else "")
    yield _finding(
        "blocks",
        f"{part} {what} {why} are not whole blocks of {size}",
        remedy,
        target,
        "model_executor/layers/quantization/utils/fp8_utils.py",
    )


def _merged(linear: Linear, subject: Subject) -> bool:
    """Whether the engine holds a linear in one with its siblings."""
    return any(
        linear.leaf in fusion.parts and (not fusion.types or subject.model_type in fusion.types)
        for fusion in FUSIONS
    )


def _finding(rule: str, numbers: str, remedy: str, target: Target, file: str) -> Finding:
    return Finding(rule, "", numbers, remedy, source(target.engine, file))


def _widths(size: int, below: int) -> str:
    return ", ".join(str(n) for n in range(1, below) if size % n == 0)
