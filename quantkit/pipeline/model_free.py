"""A run without a model class: from tensors to tensors, by their names and shapes (`models/names.py`).

Nothing of transformers' models is asked, and no code of the checkpoint runs. What is not quantized is copied byte for
byte; what is quantized goes through in pieces of rows (`pieces.py`), so that memory does not grow with the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import quantkit_eval
import torch
from quantkit_eval.protocols import Tokenizer

from quantkit.checkpoint.records import TensorRecord, plain
from quantkit.checkpoint.shards import Entry, Streamed, shard_name, write_shard
from quantkit.checkpoint.verify import verify_streamed
from quantkit.errors import ModelError
from quantkit.models.borders import quiet, reason
from quantkit.models.companions import CODE
from quantkit.models.config import open_config
from quantkit.models.tokenizer import open_tokenizer
from quantkit.pipeline.pieces import Alike, PiecewiseLinear, sharing
from quantkit.pipeline.shard_writer import ShardWriter

if TYPE_CHECKING:
    from quantkit.pipeline.run import Run
    from quantkit.pipeline.tracker import Tracker


def stream_parts(run: Run, writer: ShardWriter, tracker: Tracker, done: int) -> None:
    """Write all shards from the `done`-th on; each is verified and journalled before the next is begun."""
    for part in range(done, run.plan.n_blocks + 1):
        stream_part(run, writer, part)
        tracker.finished(part)


def stream_part(run: Run, writer: ShardWriter, part: int) -> None:
    """Write, verify and journal one shard."""
    linears: dict[str, PiecewiseLinear] = {}
    for plans in sharing(run, part):
        alike = Alike(plans, run.source, writer.codec)
        linears |= {plan.name: PiecewiseLinear(plan, alike) for plan in plans}
    tensors: dict[str, Entry] = {}
    account: dict[str, TensorRecord] = {}
    for name, info in run.parts[part].items():
        linear = linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if linear is not None:
            made: dict[str, Entry] = {f"{linear.name}.{leaf}": e for leaf, e in linear.leaves().items()}
            record = TensorRecord("quantized", sorted(made))
        elif info.parts:
            made = {name: Streamed(info.dtype, info.shape, partial(_decoded, run, name))}
            record = TensorRecord("decoded", [name])
        else:
            made, record = {name: info}, TensorRecord("copied", [name])
        tensors |= made
        account |= {part.name: record for part in info.stored}
    path = run.output / shard_name(part, run.plan.n_blocks + 1)
    with run.clock("quantize"), torch.no_grad():
        written = write_shard(path, tensors)
        layers = [linears[plan.name].record() for plan in run.plans(part)]
    with run.clock("verify"):
        verify_streamed(path, written, {n: each.made() for n, each in linears.items()}, writer.codec)
    writer.journal.append(
        {
            "part": part,
            "written": asdict(written),
            "account": plain(account),
            "layers": plain(layers),
            "scaling": [],
            "experts": [],
            "streams": None,
        }
    )


def _decoded(run: Run, name: str) -> Iterator[torch.Tensor]:
    info = run.source.raw(name)
    if len(info.shape) > 2:  # stacked experts, one after the other
        yield from (run.source.part(name, index) for index in range(info.shape[0]))
    else:
        yield run.source.tensor(name)


def evaluable(path: Path) -> tuple[Tokenizer | None, str]:
    """(the tokenizer of a model that transformers can run, ""), or (None, why nothing can be evaluated)."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            config = open_config(path)
            if type(config) not in AutoModelForCausalLM._model_mapping:
                raise ModelError(f"transformers has no causal LM of the type {config.model_type}")
            return open_tokenizer(path), ""
    except (ModelError, quantkit_eval.EvalError, OSError) as error:
        return None, f"not evaluated, as no model class was found: {reason(error)}"


def notes(run: Run, left_out: dict[str, str]) -> list[str]:
    """What a report says of a run without a model class."""
    reasons: dict[str, int] = {}
    for _, why in run.plan.skipped:
        reasons[why] = reasons.get(why, 0) + 1
    found = [
        f"model_free: {len(run.plan.layers)} linears were found by their names and shapes, without a model class",
        *(f"left as they are: {count}, {why}" for why, count in reasons.items()),
    ]
    if code := [name for name in left_out if Path(name).suffix in CODE]:
        found.append(
            f"code stays behind, as quantkit never runs or copies it: {', '.join(code[:8])}; engines that need it "
            "take it from the original checkpoint"
        )
    return found
